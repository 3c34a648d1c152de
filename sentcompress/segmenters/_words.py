"""Word lists of the regex segmenter: abbreviations by what a full stop after them means, in lower case."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NEVER_LAST = _words(
    """
    mr mrs ms mx messrs mme mlle dr drs prof sen rep reps sens gov gen col maj lt lieut capt cmdr sgt
    cpl pvt adm rev fr hon pres supt insp det amb mt ft vs v viz cf e.g i.e eg ie approx ca circa incl
    excl resp esp est nr bzw vgl z.b d.h u.a hr frl str sra srta dra mgr msgr ven atty asst assoc dist
    ed eds trans transl orig publ repr suppl al feat w.r.t a.k.a
    """
)
"""Something follows them within the sentence, whatever it looks like."""

BEFORE_NUMBER = _words(
    """
    no nos nr fig figs eq eqs eqn sec secs sect ch chap chs vol vols pp para paras art arts op ex pt pts
    app ver tab tbl prop thm def cor lem ln pl ref refs bk
    """
)
"""No sentence ends between them and a number."""

DATES = _words(
    """
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thur thurs fri
    """
)

MAY_END = _words(
    """
    inc corp ltd co cos bros llc plc jr sr esq st ave blvd rd hwy sq univ dept govt intl natl ala ariz
    ark calif colo conn del fla ga ill ind kan kans ky la mass md mich minn miss mo mont neb nev okla
    ore penn pa tenn tex va vt wash wis wyo ont que mex ph.d m.d b.a m.a b.sc m.sc ll.b ll.m d.c a.d b.c
    """
)
"""They end a sentence only before a word that opens one."""

BEFORE_CAPITAL = _words("etc min max avg hrs hr lb lbs oz tbsp tsp km cm mm kg ml")
"""They end a sentence before a capital letter."""

SHORT_LAST = _words(
    """
    it me him her us you too so now up out in on off one two all yes no not do did go way day lol ok
    """
)
"""Short lower-case words that do end sentences, also where the next one opens in lower case."""

HEADINGS = _words(
    """
    chapter part section act scene book article lesson step table figure appendix volume canto
    """
)

STARTERS = _words(
    """
    The A An This That These Those It He She They We You I His Her Its Their Our My Your There Here In
    On At By For From With Without To Of As If When While Where Who What Why How Which Whose Because
    Since Although Though Until After Before During However But And Or So Yet Then Thus Therefore Also
    Now Not No Yes Is Are Was Were Do Does Did Has Have Had Can Could Will Would Should May Might Must
    Let All Any Some Many Most Much More Few Each Every Both Another Other Others One Two Three Once
    Only Even Just Still Such Perhaps Maybe Please Thank Thanks Today Yesterday Tomorrow Later Soon
    Meanwhile Moreover Furthermore Nevertheless Nobody Nothing Everyone Everything Someone It's It’s I'm
    I’m He's He’s She's She’s They're They’re We're We’re That's That’s There's There’s Don't Don’t
    Didn't
    """
)
"""Capitalized words that open a sentence far more often than they are part of a name."""

NAMES_WITH_MARK = _words("yahoo jeopardy")
AFTER_COMMA = _words("Jr Sr Inc Ltd LLC Esq II III IV Ph M.D etc")
"""A comma before one of these joins it to a name and divides nothing."""
