"""A seeded maker of captions like COCO's, full of what makes tokenisers differ."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mmkit.eval.scorers.ptb import clean_lines

_MARKS = """. , ; : ! ? ' " ` ( ) [ ] { } < > / \\ - _ & % $ # @ * + = ~ ^ | .. ... -- ?! !! '' `` ’ ‘ “ ” – — … ½ € £ °"""
MARKS = [
    *_MARKS.split(),
    "\u00a0",
    "\u2011",
    "\u200b",
    "😀",
    "©",
    "™",
    "×",
    "•",
    "\t",
    "  ",
    "\r",
    "\x0b",
    "\x0c",
    "\x85",
    "\u2028",
    "\u2029",
]
_WORDS = """St. Ave. Blvd. Rd. Mr. Mrs. Dr. Jr. Inc. vs. etc. a.m. p.m. U.S. U.S.A. T.V. TV. No. 5:54pm 10:30 22 3/4 1/2 7½ 3,000
$5.00 50% 1,000-foot 1.5-liter 12-year-old t-shirt T-Shirt mid-air isn't can't cannot gonna man's men's dogs' rock'n'roll y'all
it’s don’t '60s '90S 1960's o'clock Hallowe'en 9/11 747 #5 #1 (a) [b] {c} :) ;) w/ w/o b/w AT&T R&B M&M's A+B e.g. i.e. D.C. Ph.D.
ft. in. lbs. oz. mph 7.5 .5 -5 +3 5' 6'2" 30" A B C K. J. JR's x-ray X 3D 2x4 4x4 10x10 90's I'm I'll he'd we've they're let's
who's 's 'n' & and/or his/her black/white/red/blue snow- -boarding http://a.com/b www.flickr.com a@b.com @ <b> &amp; &quot; NYC
N.Y. O'Neil D'Angelo Mt. Sept. Dec. Capt. Lt. Gov. Prof. Rev. Oct. 3rd 1st 2012. 2012, '12 5pm 5p.m. 4th. ark. mass. miss. tv..
.. ... .a .The man.The water.One red,green-and-white no-op., away--400 setup.py-based 3.x café €5 £3 5¢ “quoted” 'quoted'
"quoted" (555) 212-555-1212 word- a_b"""
WORDS = _WORDS.split()
ENDS = [".", ". ", " .", "..", "!", "?", ",", " ", ""]


def odd_captions(real: Sequence[str], count: int, *, seed: int, oddness: float = 1.0) -> list[str]:
    """Captions made of halves of real ones, with odd words and marks put in.

    Args:
        real: Captions to recombine.
        count: How many to make.
        seed: Of the draws.
        oddness: Mean number of odd words in a caption, and a scale of how many marks are put in.
    """
    rng = random.Random(seed)
    return [_caption(rng, real, oddness) for _ in range(count)]


def _caption(rng: random.Random, real: Sequence[str], oddness: float) -> str:
    left, right = rng.choice(real).split(), rng.choice(real).split()
    words = left[: rng.randrange(len(left) + 1)] + right[rng.randrange(len(right) + 1) :]
    for _ in range(rng.choice([0, 1, 2])):
        if rng.random() < oddness:
            words.insert(rng.randrange(len(words) + 1), rng.choice(WORDS))
    if words and rng.random() < 0.4 * oddness:
        place = rng.randrange(len(words))
        words[place] = rng.choice([words[place] + rng.choice(MARKS), rng.choice(MARKS) + words[place]])
    style = rng.random()
    if style < 0.05:
        words = [word.upper() for word in words]
    elif style < 0.1:
        words = [word.capitalize() for word in words]
    return " ".join(words) + rng.choice(ENDS)


def cleaned(captions: Sequence[str]) -> list[str]:
    """Without line ends, which pycocoevalcap cannot take."""
    return [clean_lines(caption) for caption in captions]
