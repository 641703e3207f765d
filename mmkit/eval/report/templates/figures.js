// The conditions behind a figure: a popover that the browser opens by itself on Enter, click or tap. This adds opening on hover
// and on keyboard focus, and puts it beside the figure instead of at the foot of the window.
(() => {
  'use strict';
  let leaving = 0;
  const place = (card, box) => {
    const room = document.documentElement.clientWidth - card.offsetWidth - 8;
    card.style.left = Math.max(8, Math.min(box.left, room)) + 'px';
    // Above the figure where there is no room below it.
    const below = box.bottom + 4, above = box.top - card.offsetHeight - 4;
    card.style.top = Math.max(8, below + card.offsetHeight > innerHeight && above > 0 ? above : below) + 'px';
    card.style.right = card.style.bottom = 'auto';
  };
  for (const figure of document.querySelectorAll('button[popovertarget]')) {
    const card = document.getElementById(figure.getAttribute('popovertarget'));
    if (!card || !card.showPopover) continue;
    const open = () => {
      clearTimeout(leaving);
      if (!card.matches(':popover-open')) card.showPopover();
    };
    const close = () => {
      clearTimeout(leaving);
      leaving = setTimeout(() => {
        const held = [figure, card].some((e) => e.matches(':hover') || e.contains(document.activeElement));
        if (!held && card.matches(':popover-open')) card.hidePopover();
      }, 120);
    };
    card.addEventListener('toggle', (event) => { if (event.newState === 'open') place(card, figure.getBoundingClientRect()); });
    for (const element of [figure, card]) {
      element.addEventListener('mouseenter', open);
      element.addEventListener('mouseleave', close);
      element.addEventListener('focusout', close);
    }
    // A mouse click focuses as well; that click must not open what it is about to open.
    figure.addEventListener('focus', () => { if (figure.matches(':focus-visible')) open(); });
  }
})();
