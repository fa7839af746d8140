#!/usr/bin/env bash
# Trains a suite of benchmark entries, one process per (config, seed), and renders the leaderboard.
# `./run_all.sh --help` explains the use of it.
set -euo pipefail

# ---------------------------------------------------------------------------- the suites
# One line is one entry: config[:argument], the seeds to run it with, and, where an entry needs
# them, further flags for fmbench.main (--config.key=value). The seeds of speed records are those
# that `python -m fmbench.speedrun --seeds=CONFIG` prints.

QUICK='
configs/mlp.py        0,1,2
configs/cnn1.py       0        --config.num_epochs=10
'

PAPER='
configs/baseline.py   0,1,2,3,4
configs/cnn2.py       0,1,2,3,4
configs/mlp.py        0,1,2,3,4
configs/vgg_like.py   0,1,2
configs/vgg_like.py   0,1,2    --config.dtype=bfloat16
configs/cnn1.py       0,1,2,3,4  --config.num_epochs=10
configs/cnn1.py       0,1,2,3,4
configs/cnn3.py       0,1,2,3,4  --config.num_epochs=10
configs/cnn3.py       0,1,2,3,4
configs/cnn4.py       0,1,2    --config.num_epochs=10
configs/cnn4.py       0,1,2
configs/fc.py:a       0,1,2,3,4
configs/fc.py:b       0,1,2,3,4
configs/transfer.py:efficientnet_lite0  0,1,2
'

FULL="$PAPER
configs/speedrun.py:93 47706,9106,48649,26024,53231
configs/speedrun.py:94 26509,23402,12285,11439,45625,60954,59165,24542,57013,62213
configs/speedrun.py:95 29095,24907,35495,42377,61427
configs/mlp.py:best   0,1,2
configs/tiny.py:20k   0,1,2
configs/tiny.py:50k   0,1,2
configs/tiny.py:100k  0,1,2
configs/resnet.py:20  0,1,2    --config.dtype=bfloat16
"

# ---------------------------------------------------------------------------- the command line

usage() {
  cat <<'END'
Usage: ./run_all.sh quick|paper|full [ENTRY...] [--force] [--results_dir=DIR]
                    [--plan | --launcher=local --jobs=N | --launcher=slurm [--max_jobs=N]]
       ./run_all.sh accelerator [PART...] [--minutes=M] [--results_dir=DIR]

Trains every entry of a suite with each of its seeds, then writes the leaderboard from all records
in DIR. Sets itself up: on the first call it makes .venv and fetches the data.

  quick    a few small nets; 10 to 15 minutes on two cores
  paper    the reference systems, three or five seeds each, their first stages too
  full     paper, the speed records and the nets made for accuracy; days on two cores
  accelerator   for a GPU or TPU that is at hand for minutes: a check, then what is worth most;
           `python -m fmbench.accelerator --help` says more

  ENTRY...            only these entries of the suite, e.g. mlp cnn1 resnet-20
  --force             train again where there is a valid record or an unfinished run
  --plan              train nothing: say which runs are left, and how many hours they take here
  --launcher=local    N runs at a time, each with as many of this machine's cores of its own: for
                      accuracies, for their records say that they shared the machine, and are no timings
  --launcher=slurm    each run a job of an array, at most N of them at a time; Ctrl-C leaves them alone,
                      and the same command shows them again; docs/suites.md says more
  --minutes=M         accelerator: all that it may take, but for the set-up (default: 8)
  --config.KEY=VALUE  accelerator: a field of all configs, for a rehearsal
  --results_dir=DIR   where the records and the leaderboard go (default: results)

Runs that already have a valid record made in this checkout are not trained again. After Ctrl-C the
same command goes on where it stopped. Exit status: 0 all done, 1 a run failed (the others were
still made), 2 a mistake in the command, 130 or 143 interrupted.
END
}

bad_usage() {
  complain "$@" 'See ./run_all.sh --help.'
  exit 2
}

# Sets suite, wanted (entry names), force, plan, results_dir, launcher, and the flags that are fmbench.suite's and
# fmbench.accelerator's own.
parse_arguments() {
  suite='' results_dir='' force='' launcher='' plan=''
  wanted=() launcher_flags=() accelerator_flags=()
  while (($#)); do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --force) force=--force ;;
      --plan) plan=--plan ;;
      --results_dir=*) results_dir=${1#*=} ;;
      --results_dir)
        results_dir=${2:-}
        if (($# > 1)); then shift; fi
        ;;
      --launcher=*)
        launcher=${1#*=}
        if [[ -z $launcher ]]; then bad_usage '--launcher has no value: expected local or slurm.'; fi
        ;;
      --jobs=* | --max_jobs=*) launcher_flags+=("$1") ;;
      --minutes=* | --config.*=*) accelerator_flags+=("$1") ;;
      -*) bad_usage "Unknown option $1: expected --force, --results_dir=DIR, --launcher=NAME or --help." ;;
      *) if [[ -z $suite ]]; then suite=$1; else wanted+=("$1"); fi ;;
    esac
    if [[ $1 == --results_dir* && -z $results_dir ]]; then
      bad_usage '--results_dir has no value: expected the folder for the records.'
    fi
    shift
  done
  if [[ -n $launcher && $launcher != local && $launcher != slurm ]]; then
    bad_usage "Unknown launcher '$launcher': expected local or slurm."
  elif [[ $suite == accelerator && -n $launcher ]]; then
    bad_usage '--launcher is not for the suite accelerator, which has one device.'
  elif [[ -z $launcher && ${#launcher_flags[@]} -gt 0 ]]; then
    bad_usage "${launcher_flags[0]} goes with --launcher=local or --launcher=slurm."
  fi
  if [[ -n $plan && ($suite == accelerator || -n $launcher$force) ]]; then
    bad_usage '--plan goes with a suite other than accelerator, and with neither --launcher nor --force.'
  fi
  if [[ $suite == accelerator && -n $force ]]; then
    bad_usage '--force is not for the suite accelerator: delete the records that are to be made again.'
  elif [[ $suite != accelerator && ${#accelerator_flags[@]} -gt 0 ]]; then
    bad_usage "${accelerator_flags[0]} is for the suite accelerator only."
  fi
}

# ---------------------------------------------------------------------------- from suite to runs

# entry_name CONFIG: configs/resnet.py:20 is the entry resnet-20.
entry_name() {
  local path=${1%%:*} argument=''
  if [[ $1 == *:* ]]; then argument=-${1#*:}; fi
  path=${path##*/}
  printf '%s%s\n' "${path%.py}" "$argument"
}

# is_among WORD WORD...: is the first word one of the others?
is_among() {
  local word=$1 other
  shift
  for other in "$@"; do
    if [[ $word == "$other" ]]; then return 0; fi
  done
  return 1
}

# Fills lines with those of the suite that are asked for, and runs with one line "name seed config flags..." for
# each of their runs.
plan_runs() {
  local entries config seeds flags name seed known=()
  case $suite in
    quick) entries=$QUICK ;;
    paper) entries=$PAPER ;;
    full) entries=$FULL ;;
    '') bad_usage 'No suite named: expected quick, paper, full or accelerator.' ;;
    *) bad_usage "Unknown suite '$suite': expected quick, paper, full or accelerator." ;;
  esac

  runs=() lines=()
  while read -r config seeds flags; do
    if [[ -z $config ]]; then continue; fi
    name=$(entry_name "$config")
    known+=("$name")
    if ((${#wanted[@]})) && ! is_among "$name" "${wanted[@]}"; then continue; fi
    lines+=("$config $seeds${flags:+ $flags}")
    for seed in ${seeds//,/ }; do
      runs+=("$name $seed $config $flags")
    done
  done <<<"$entries"

  for name in ${wanted[@]+"${wanted[@]}"}; do
    if ! is_among "$name" "${known[@]}"; then
      bad_usage "Unknown entry '$name': the suite $suite has ${known[*]}."
    fi
  done
}

# ---------------------------------------------------------------------------- processes and signals

child=''   # the process group that is training, if any
current='' # what is being done, for the message after an interruption

# run COMMAND...: runs it as a process group of its own. Bash would keep a signal to itself until
# its foreground command is over, maybe hours later; waiting for a background one, it hears it at
# once. And a group of its own gets Ctrl-C from `interrupt` only, once, not from the terminal too.
run() {
  local status=0
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  wait "$child" || status=$?
  # Ctrl-Z and `fg` end `wait`, but not the child.
  while kill -0 "$child" 2>/dev/null; do
    status=0
    wait "$child" || status=$?
  done
  child=''
  return "$status"
}

# interrupt SIGNAL STATUS: what Ctrl-C, `kill` and a closed terminal do. The whole suite stops.
interrupt() {
  if [[ -n $child ]]; then
    kill -s "$1" -- "-$child" 2>/dev/null || true
    # A stopped (Ctrl-Z) child cannot act on the signal before it goes on.
    kill -s CONT -- "-$child" 2>/dev/null || true
    # It still has its checkpoint to write; a second Ctrl-C reaches it as well.
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  fi
  stop_suite "$2"
}

stop_suite() {
  complain '' "Interrupted${current:+ during $current}. Finished runs are kept;" \
    'the same command goes on where this one stopped.'
  if [[ -n $force ]]; then
    complain '(Leave out --force for that: with it, the runs finished so far are trained again too.)'
  fi
  exit "$1"
}

# Ctrl-Z: training in its own process group has to be told to pause too, and to go on after `fg`. By TSTP,
# which fmbench.suite passes on to the groups of its runs.
pause() {
  if [[ -n $child ]]; then kill -s TSTP -- "-$child"; fi
  kill -s STOP $$
  if [[ -n $child ]]; then kill -s CONT -- "-$child"; fi
}

catch_signals() {
  trap 'interrupt INT 130' INT
  trap 'interrupt TERM 143' TERM
  trap 'interrupt TERM 129' HUP
  trap pause TSTP
}

# stops_suite STATUS: did the child end because somebody interrupted it?
stops_suite() { (($1 == 130 || $1 == 143)); }

meaning_of() {
  case $1 in
    2) echo 'a mistake in its config or flags' ;;
    3) echo 'diverged' ;;
    137) echo 'killed, perhaps for want of memory' ;;
    *) echo 'see its messages above' ;;
  esac
}

# ---------------------------------------------------------------------------- the whole job

main() {
  local caller_dir=$PWD
  CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
  # shellcheck source=setup_env.sh
  source ./setup_env.sh

  parse_arguments "$@"
  runs=() lines=()
  if [[ $suite != accelerator ]]; then plan_runs; fi
  # A relative folder is relative to where the command was given, not to this script.
  if [[ -z $results_dir ]]; then
    results_dir=results
  elif [[ $results_dir != /* && ! $caller_dir -ef $PWD ]]; then
    results_dir=$caller_dir/$results_dir
  fi

  if [[ -n $plan ]]; then
    set_up_environment
    exec "$PYTHON" -m fmbench.suite --plan --results_dir="$results_dir" "${lines[@]}"
  fi
  catch_signals
  current='set-up'
  local pages=(leaderboard.md speedrun.md)
  if [[ $suite == accelerator ]]; then
    set_up_environment --without=onednn-cpu-gomp # which is for CPUs
  else
    local extras=(figures) # the Pareto picture
    if [[ $launcher == slurm ]]; then extras+=(slurm); fi
    set_up_environment "${extras[@]}"
    pages+=(pareto.svg)
  fi

  local status=0 failures=() number=0 num_runs=${#runs[@]} line name seed config flags file
  current='the preparation of the data'
  run "$PYTHON" -m fmbench.datasets || status=$?
  if stops_suite "$status"; then stop_suite "$status"; fi
  if ((status)); then
    complain 'Nothing was trained: the data could not be prepared (see above).'
    exit "$status"
  fi

  if [[ $suite == accelerator ]]; then
    current='the suite accelerator'
    run "$PYTHON" -m fmbench.accelerator ${wanted[@]+"${wanted[@]}"} \
      ${accelerator_flags[@]+"${accelerator_flags[@]}"} --results_dir="$results_dir" || status=$?
    if stops_suite "$status"; then stop_suite "$status"; fi
    if ((status == 2)); then exit 2; fi
    if ((status)); then failures+=("$current (exit status $status: see its messages above)"); fi
    runs=()
  fi
  if [[ -n $launcher ]]; then
    current="the suite $suite"
    # shellcheck disable=SC2086  # force is a word, or nothing
    run "$PYTHON" -m fmbench.suite --launcher="$launcher" ${launcher_flags[@]+"${launcher_flags[@]}"} \
      --results_dir="$results_dir" $force "${lines[@]}" || status=$?
    if stops_suite "$status"; then stop_suite "$status"; fi
    if ((status == 2)); then exit 2; fi
    if ((status)); then failures+=("runs of $current (see the messages above)"); fi
    runs=()
  fi
  for line in ${runs[@]+"${runs[@]}"}; do
    read -r name seed config flags <<<"$line"
    number=$((number + 1))
    current="$name seed $seed"
    heading "[$number/${#runs[@]}] $current"
    status=0
    # shellcheck disable=SC2086  # flags and force are words, or nothing
    run "$PYTHON" -m fmbench.main --config="$config" --config.seed="$seed" $flags \
      --results_dir="$results_dir" $force || status=$?
    if stops_suite "$status"; then stop_suite "$status"; fi
    if ((status)); then
      failures+=("$current (exit status $status: $(meaning_of "$status"))")
      complain "$current failed with exit status $status; going on."
    fi
  done

  heading 'Leaderboard'
  for file in "${pages[@]}"; do
    current=$file
    status=0
    run "$PYTHON" -m "fmbench.${file%.*}" --results_dir="$results_dir" || status=$?
    if stops_suite "$status"; then stop_suite "$status"; fi
    if ((status)); then
      failures+=("$file (exit status $status: see its messages above)")
    else
      echo "$results_dir/$file is up to date."
    fi
  done

  if ((${#failures[@]})); then
    complain "${#failures[@]} failed:" "${failures[@]/#/  }"
    exit 1
  fi
  local what="$num_runs runs of the suite $suite"
  if [[ $suite == accelerator ]]; then what='The suite accelerator'; fi
  echo "$what done in $((SECONDS / 60)) min $((SECONDS % 60)) s."
}

# Sourced (by the tests), this file only defines its functions.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then main "$@"; fi
