// The gallery: filters, search, pages and single samples over the JSON inside this page. Plain DOM, no library, and text only
// ever set as text: what models said is never read as HTML. Without this script the page shows a sample of a dozen pictures.
(() => {
  'use strict';
  const source = document.getElementById('gallery-data');
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const $ = (id) => document.getElementById(id);
  const form = $('filters'), viewer = $('viewer'), count = $('count'), pager = $('pager');
  // Places in a sample's row; mmkit/eval/report/viewer.py writes them.
  const PICTURE = 0, TASK = 1, TYPE = 2, ID = 3, QUESTION = 4, TRUTHS = 5, PROMPT = 6, ANSWERS = 7;
  const TEXT = 0, SCORE = 1, PARSED = 2, SHOWN = 3, ASKED = 4;
  const PAGE = 24;  // samples in the document at a time, however many there are
  const EMPTY = { task: '', type: '', show: '', disagree: '', order: '', q: '', page: '1' };
  let state = { ...EMPTY }, list = [];

  function make(tag, name, ...children) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    element.append(...children.filter((child) => child !== null && child !== ''));
    return element;
  }

  // Thumbnails: a chunk is cut into lines when one of its pictures is needed; only a few chunks are kept.
  const chunks = new Map();
  function uri(index) {
    const number = Math.floor(index / data.chunk);
    if (!chunks.has(number)) {
      if (chunks.size > 7) chunks.delete(chunks.keys().next().value);
      chunks.set(number, $('thumbs-' + number).textContent.trim().split('\n'));
    }
    return chunks.get(number)[index % data.chunk];
  }
  // A picture is decoded when it comes near the window, not before.
  function show(image) {
    image.src = uri(Number(image.dataset.picture));
    near.unobserve(image);
  }
  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) if (isIntersecting) show(target);
  }, { rootMargin: '300px' });
  // Paper has no window to come near to.
  addEventListener('beforeprint', () => {
    for (const image of viewer.querySelectorAll('img:not([src])')) {
      image.decoding = 'sync';
      show(image);
    }
  });

  function picture(index, large) {
    const [name, width, height, pixelated, missing] = data.pictures[index];
    if (missing) return make('div', 'placeholder', name, make('br'), missing);
    const image = make('img', pixelated ? 'pixels' : '');
    // Small drawings by a whole factor, so that their pixels stay squares.
    const factor = (pixelated ? Math.max(1, Math.floor(data.side / Math.max(width, height))) : 1) * (large ? 2 : 1);
    image.width = width * factor;
    image.height = height * factor;
    image.alt = name;
    image.decoding = 'async';
    image.dataset.picture = index;
    near.observe(image);
    return image;
  }

  const kind = (score) => (score === null ? '' : score >= 1 - 1e-9 ? 'right' : score > 0 ? 'partly' : 'wrong');
  const scores = (sample) => sample[ANSWERS].filter((a) => a && a[SCORE] !== null).map((a) => a[SCORE]);

  function mark(answer, task) {
    if (answer[SCORE] === null) return '';
    const figure = (answer[SCORE] * task.scale).toFixed(task.digits);
    if (!task.marks) return make('span', 'mark figure', `${task.heading} ${figure}`);
    const verdict = kind(answer[SCORE]);
    return make('span', 'mark ' + verdict, verdict === 'partly' ? `partly ${figure} %` : verdict);
  }

  // Filters.
  const spoken = [];  // searchable text of each sample, made when first searched
  function text(number) {
    const s = data.samples[number];
    spoken[number] ??= [s[ID], s[QUESTION], data.pictures[s[PICTURE]][0], ...s[TRUTHS].map((t) => t[0]),
      ...s[ANSWERS].map((a) => (a ? a[TEXT] : ''))].join('\n').toLowerCase();
    return spoken[number];
  }
  const shows = {
    '': () => true,
    any: (s) => s[ANSWERS].some((a) => a && a[SCORE] === 0),
    all: (s) => scores(s).length > 0 && scores(s).every((x) => x === 0),
    partly: (s) => scores(s).some((x) => kind(x) === 'partly'),
    right: (s) => scores(s).length > 0 && scores(s).every((x) => kind(x) === 'right'),
  };
  function shown(s) {
    if (state.show.startsWith('system-')) {
      const answer = s[ANSWERS][Number(state.show.slice(7))];
      return Boolean(answer) && answer[SCORE] === 0;
    }
    return (shows[state.show] || shows[''])(s);
  }
  // One is right where another is not: unequal words alone are no disagreement.
  const disagree = (s) => new Set(scores(s).map((x) => kind(x) === 'right')).size > 1;
  const spread = (s) => Math.max(...scores(s), 0) - Math.min(...scores(s), Infinity);
  const mean = (s) => scores(s).reduce((a, b) => a + b, 0) / scores(s).length;
  const orders = { worst: (a, b) => mean(a) - mean(b), spread: (a, b) => spread(b) - spread(a) };

  function filter() {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    list = [];
    data.samples.forEach((s, number) => {
      if (state.task && data.tasks[s[TASK]].name !== state.task) return;
      if (state.type && data.types[s[TYPE]] !== state.type) return;
      // Captions are neither right nor wrong, so a filter by that leaves them out.
      if ((state.show || state.disagree) && !data.tasks[s[TASK]].marks) return;
      if (!shown(s) || (state.disagree && !disagree(s))) return;
      if (words.every((word) => text(number).includes(word))) list.push(number);
    });
    const order = orders[state.order];
    if (order) {
      list = list.filter((number) => scores(data.samples[number]).length);
      list.sort((a, b) => order(data.samples[a], data.samples[b]) || a - b);
    }
  }

  // Drawing.
  const anchor = (s) => `#sample=${encodeURIComponent(data.tasks[s[TASK]].name)}/${encodeURIComponent(s[ID])}`;

  function answers(s, whole) {
    const task = data.tasks[s[TASK]], table = make('dl', 'answers');
    s[ANSWERS].forEach((answer, i) => {
      if (!answer) return;
      const said = make('span', 'said', answer[TEXT] || '(empty)');
      said.dir = 'auto';
      const place = make('dd', '', said, ' ', mark(answer, task));
      if (whole && typeof answer[PARSED] === 'string') place.append(make('span', 'note', `read as “${answer[PARSED]}”`));
      if (answer[SHOWN] !== undefined && answer[SHOWN] !== null) {
        const other = typeof answer[SHOWN] === 'number' ? data.pictures[answer[SHOWN]][0] : answer[SHOWN];
        const told = make('span', 'note', 'shown instead: ' + other);
        if (whole && typeof answer[SHOWN] === 'number') told.append(picture(answer[SHOWN], false));
        place.append(told);
      }
      table.append(make('div', '', make('dt', '', data.systems[i]), ' ', place));
    });
    return table;
  }

  function truths(s, whole) {
    // The answers people gave, most frequent first; a card has room for three.
    const sorted = [...s[TRUTHS]].sort((a, b) => b[1] - a[1]);
    const kept = whole ? sorted : sorted.slice(0, data.tasks[s[TASK]].marks ? 3 : 1);
    const words = kept.map(([words, n]) => (s[TRUTHS].length > 1 && n > 1 ? `${words} (${n})` : words));
    const element = make('p', 'truth', make('span', 'asked', 'Truth'), words.join(whole ? '\n' : ', ') || '(no reference)');
    element.dir = 'auto';
    return element;
  }

  // Who was asked in which words, a block for each wording.
  function prompts(s) {
    const asked = new Map();
    s[ANSWERS].forEach((answer, i) => {
      if (!answer) return;
      const prompt = data.prompts[answer[ASKED] ?? s[PROMPT]];
      asked.set(prompt, [...(asked.get(prompt) || []), data.systems[i]]);
    });
    return [...asked].filter(([prompt]) => prompt).flatMap(([prompt, systems]) =>
      [make('p', 'note', asked.size > 1 ? `Prompt of ${systems.join(', ')}:` : 'Prompt:'), make('pre', '', prompt)]);
  }

  function card(number, whole) {
    const s = data.samples[number], task = data.tasks[s[TASK]].name, type = data.types[s[TYPE]];
    const link = make('a', '', `${task} ${s[ID]}`);
    link.href = anchor(s);
    const asked = make(whole ? 'h3' : 'p', 'question', s[QUESTION] || 'Caption');
    asked.dir = 'auto';
    const words = make('div', '', asked, truths(s, whole), answers(s, whole), make('p', 'note', link, type ? `, ${type}` : ''));
    if (whole) words.append(...prompts(s));
    const frame = make('figure', '', picture(s[PICTURE], whole));
    if (whole) frame.append(make('figcaption', '', data.pictures[s[PICTURE]][0]));
    return make('article', whole ? 'sample whole' : 'sample', frame, words);
  }

  function button(words, action, disabled) {
    const element = make('button', '', words);
    element.type = 'button';
    element.disabled = disabled;
    element.addEventListener('click', action);
    return element;
  }

  // The button that was pressed is gone with the page it was on: whoever has no mouse goes on from the samples.
  function arrive(change) {
    change();
    $('gallery').scrollIntoView();
    viewer.focus({ preventScroll: true });
  }

  function showList() {
    const pages = Math.max(1, Math.ceil(list.length / PAGE));
    const page = Math.min(Math.max(1, Number(state.page) || 1), pages);
    const turn = (to) => () => arrive(() => go({ page: String(to) }));
    viewer.replaceChildren(...list.slice((page - 1) * PAGE, page * PAGE).map((number) => card(number, false)));
    count.textContent = `${list.length.toLocaleString('en')} of ${data.samples.length.toLocaleString('en')} samples`;
    pager.replaceChildren(button('Previous', turn(page - 1), page === 1), `Page ${page} of ${pages}`,
      button('Next', turn(page + 1), page === pages));
    form.hidden = false;
  }

  function showOne(number) {
    const at = list.indexOf(number);
    const open = (i) => () => { location.hash = anchor(data.samples[list[i]]); };
    form.hidden = true;
    count.textContent = at < 0 ? '' : `Sample ${at + 1} of ${list.length}`;
    viewer.replaceChildren(number < 0 ? make('p', '', 'This page has no such sample.') : card(number, true));
    pager.replaceChildren(button('Previous', open(at - 1), at <= 0), button('All samples', () => arrive(() => go({})), false),
      button('Next', open(at + 1), at < 0 || at === list.length - 1));
  }

  // The address says what is shown, so that it can be sent to somebody.
  function go(changes) {
    state = { ...state, ...changes };
    const said = Object.entries(state).filter(([key, value]) => value !== EMPTY[key]);
    history.replaceState(null, '', '#gallery' + (said.length ? '?' + new URLSearchParams(said) : ''));
    refresh();
  }
  function refresh() {
    filter();
    for (const [key, value] of Object.entries(state)) {
      const field = form.elements[key];
      if (!field) continue;
      if (field.type === 'checkbox') field.checked = Boolean(value);
      else if (field.value !== value) field.value = value;
    }
    showList();
  }
  // A link that was cut or typed by hand may end within an escape.
  function plain(text) {
    try { return decodeURIComponent(text); } catch { return text; }
  }
  function route() {
    const hash = location.hash;
    if (hash.startsWith('#sample=')) {
      const [task, id] = hash.slice(8).split('/', 2).map(plain);
      filter();
      let number = list.find((i) => data.samples[i][ID] === id && data.tasks[data.samples[i][TASK]].name === task);
      // Not among those of the present filter: it is shown all the same, and the filter goes.
      if (number === undefined) {
        state = { ...EMPTY };
        filter();
        number = list.find((i) => data.samples[i][ID] === id && data.tasks[data.samples[i][TASK]].name === task) ?? -1;
      }
      arrive(() => showOne(number));
    } else if (hash.startsWith('#gallery?')) {
      state = { ...EMPTY, ...Object.fromEntries(new URLSearchParams(hash.slice(9))) };
      refresh();
    } else if (form.hidden && (hash === '' || hash === '#gallery')) {
      // Back from a sample to a list that has no filter to tell.
      state = { ...EMPTY };
      refresh();
    }
  }

  function options(name, pairs) {
    form.elements[name].append(...pairs.map(([value, words]) => {
      const option = make('option', '', words);
      option.value = value;
      return option;
    }));
  }

  options('task', data.tasks.map((task) => [task.name, task.name]));
  options('type', data.types.filter(Boolean).map((type) => [type, type]));
  options('show', data.systems.map((system, i) => ['system-' + i, `wrong: ${system}`]));
  form.elements.type.closest('label').hidden = !data.types.some(Boolean);
  form.elements.task.closest('label').hidden = data.tasks.length < 2;
  form.elements.disagree.closest('label').hidden = data.systems.length < 2;
  for (const name of ['task', 'type', 'show', 'order']) {
    form.elements[name].addEventListener('change', (event) => go({ [name]: event.target.value, page: '1' }));
  }
  form.elements.disagree.addEventListener('change', (event) => go({ disagree: event.target.checked ? '1' : '', page: '1' }));
  form.elements.q.addEventListener('input', (event) => go({ q: event.target.value, page: '1' }));
  form.addEventListener('submit', (event) => event.preventDefault());
  form.addEventListener('reset', (event) => { event.preventDefault(); go({ ...EMPTY }); });
  // A single sample is turned like a page, unless somebody is typing.
  addEventListener('keydown', (event) => {
    const side = { ArrowLeft: 'Previous', ArrowRight: 'Next' }[event.key];
    if (!side || !form.hidden || event.altKey || event.ctrlKey || event.metaKey || !viewer.contains(document.activeElement)) return;
    [...pager.querySelectorAll('button')].find((b) => b.textContent === side && !b.disabled)?.click();
  });
  addEventListener('hashchange', route);
  $('sampled').remove();
  for (const element of [viewer, pager, count, $('drawn')]) element.hidden = false;
  refresh();
  route();
})();
