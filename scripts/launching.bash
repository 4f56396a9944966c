# What the launchers share; sourced, not run.

fail() { echo "error: $*" >&2; exit 2; }

# The comment at the head of the script, which is its help.
usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0"; exit 0; }

# value OPTION GIVEN...: stops where an option has no value; an empty one is none.
value() { [ -n "${2:-}" ] || fail "$1 needs a value; see scripts/$(basename "$0") --help"; }

whole() { [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 takes a whole number from 1, but got '$2'"; }

# A name that gcloud, Kubernetes and file systems all take.
plain_name() {
  [[ $2 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "$1 '$2' must be 1 to 40 lower-case letters, digits and dashes, with a letter first and no dash last"
}

unknown() { fail "unknown option '$1'; see scripts/$(basename "$0") --help"; }

# tool NAME FIX: stops where a program is missing.
tool() { command -v "$1" >/dev/null || fail "$1 is not installed or not on PATH; $2"; }

# The words as one line that a shell reads back as the same words.
quoted() {
  local word text=''
  for word in "$@"; do
    # As it stands where nothing in it is special; in single quotes otherwise.
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then text+=" $word"
    else text+=" '${word//\'/\'\\\'\'}'"; fi
  done
  printf '%s' "${text# }"
}
