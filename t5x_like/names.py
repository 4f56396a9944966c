"""Nearest names, for error messages that say what was probably meant."""

import difflib
from collections.abc import Iterable


def nearest(name: str, candidates: Iterable[str], *, count: int = 3) -> list[str]:
  """Returns the candidates closest to a name, best first, ignoring case.

  Args:
    name: what was written.
    candidates: the names that exist.
    count: how many to return at most.
  """
  by_lower = {c.lower(): c for c in candidates if c != name}
  found = difflib.get_close_matches(name.lower(), list(by_lower), n=count, cutoff=0.6)
  return [by_lower[f] for f in found]


def suggest(name: str, candidates: Iterable[str]) -> str:
  """Returns `; did you mean 'x'?`, or a list of what exists, ready to end a sentence."""
  candidates = sorted(set(candidates))
  close = nearest(name, candidates, count=1)
  if close:
    return f"; did you mean '{close[0]}'?"
  public = [c for c in candidates if not c.startswith('_')]
  if not public:
    return ''
  shown = ', '.join(public[:12]) + (', ...' if len(public) > 12 else '')
  return f'; it has: {shown}'
