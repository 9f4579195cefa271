# shellcheck shell=bash
# shellcheck disable=SC2034  # the scripts that source this file use the variables set here
# What the sample scripts share: arguments, names of runs, and the loop over variants. Sourced, not run.
# Written for bash 3.2, which macOS has: no associative arrays, and "${array[@]}" of an empty one needs a guard.

RESULTS=${RESULTS:-results}
EVALUATED=${EVALUATED:-evaluated_results}
LOG_PROJECT=${LOG_PROJECT:-project}
PYTHON=${PYTHON:-python}
case $RESULTS in -*) RESULTS=./$RESULTS ;; esac # else the commands take the folder for an option
case $EVALUATED in -*) EVALUATED=./$EVALUATED ;; esac
readonly NOT_TRAINED=3 # the Python commands leave with 0, 1, 2 or 130
failed=()
skipped=()
num_done=0

complain() {
    printf 'error: %s\n' "$*" >&2
}

usage() {
    cat <<USAGE
usage: $0 [DATA_PATH] [--offline] [options for every Python command ...]
    DATA_PATH     the folder that holds the classes, before other options; taken from $1 if left out
    --offline     backbones whose weights come as Python packages
    Environment: CLASSES and VARIANTS pick some by name, RESULTS and EVALUATED are the folders to write to, PYTHON
    is the interpreter; the head of the script has examples
USAGE
}

# read_arguments PATH_VARIABLE DOWNLOAD_PAGE "$@" sets datapath, offline (yes or no), flags and typed_seed.
read_arguments() {
    local variable=$1 download=$2 argument path_may_follow=yes
    shift 2
    datapath=${!variable:-}
    offline=no
    flags=()
    for argument in "$@"; do
        case $path_may_follow,$argument in
        *,--help | *,-h)
            usage "$variable"
            exit 0
            ;;
        *,--offline) offline=yes ;;
        yes,-* | no,*)
            flags+=("$argument")
            path_may_follow=no
            ;;
        *)
            datapath=$argument
            path_may_follow=no
            ;;
        esac
    done
    case $datapath in -*) datapath=./$datapath ;; esac # from the variable
    find_seed ${flags[@]+"${flags[@]}"}
    require_data "$variable" "$download"
    require_python
}

# find_seed FLAGS ... sets typed_seed: the first --seed that is a number, or nothing; Python refuses all others.
find_seed() {
    local flag
    typed_seed=
    while [ "$#" -gt 0 ] && [ -z "$typed_seed" ]; do
        flag=$1
        shift
        case $flag in
        --seed) typed_seed=$(whole_number "${1:-}") ;;
        --seed=*) typed_seed=$(whole_number "${flag#--seed=}") ;;
        esac
    done
}

# whole_number TEXT prints a number of any length without leading zeros, and nothing for other text.
whole_number() {
    local digits
    case $1 in '' | *[!0-9]*) return ;; esac
    digits=${1#"${1%%[!0]*}"}
    printf '%s\n' "${digits:-0}"
}

# require_data PATH_VARIABLE DOWNLOAD_PAGE ends the script unless datapath is a folder.
require_data() {
    if [ -z "$datapath" ]; then
        complain "no data path: give it as the first argument, before other options, or as $1;" \
            "the data set is to be had at $2"
        usage "$1" >&2
        exit 2
    fi
    if [ ! -d "$datapath" ]; then
        complain "data path '$datapath' is no folder, expected the one that holds the classes; the data set is at $2"
        exit 2
    fi
}

# require_python ends the script unless PYTHON is an interpreter that has the package.
require_python() {
    if ! command -v "$PYTHON" >/dev/null; then
        complain "no command $PYTHON: activate the environment, or name the interpreter as PYTHON=/path/to/python"
        exit 2
    fi
    if ! "$PYTHON" -c 'import patchcore' >/dev/null 2>&1; then
        complain "$PYTHON cannot import patchcore: activate the environment, run 'pip install -e .' in the" \
            "repository, or name the interpreter as PYTHON=/path/to/python"
        exit 2
    fi
}

# is_one_of NAME KNOWN ...
is_one_of() {
    local name=$1 known
    shift
    for known in "$@"; do
        if [ "$name" = "$known" ]; then return 0; fi
    done
    return 1
}

# set_names STRING DEFAULT ... sets names: the words of the string, or the defaults if there are none.
set_names() {
    local string=$1
    shift
    names=("$@")
    if [[ $string = *[![:space:]]* ]]; then
        IFS=$' \t\n' read -r -d '' -a names <<<"$string" || true # read says no at the end of its input
    fi
}

# refuse_repeated VARIABLE NAME ... ends the script if a name is there twice.
refuse_repeated() {
    local variable=$1 name
    shift
    while [ "$#" -gt 1 ]; do
        name=$1
        shift
        if is_one_of "$name" "$@"; then
            complain "$variable has '$name' more than once, expected each name once: leave one out"
            exit 2
        fi
    done
}

# choose_known VARIABLE WHAT KNOWN ... sets names: those in the variable, or all; ends the script for an unknown one.
choose_known() {
    local variable=$1 what=$2 name
    shift 2
    set_names "${!variable:-}" "$@"
    for name in "${names[@]}"; do
        if ! is_one_of "$name" "$@"; then
            complain "unknown $what '$name' in $variable, expected some of: $*"
            exit 2
        fi
    done
    refuse_repeated "$variable" "${names[@]}"
}

# choose_variants KNOWN ... sets variants: those in VARIANTS, or all.
choose_variants() {
    choose_known VARIANTS variant "$@"
    variants=("${names[@]}")
}

# choose_methods KNOWN ... sets variants: those in METHODS, or all.
choose_methods() {
    choose_known METHODS method "$@"
    variants=("${names[@]}")
}

# choose_classes KNOWN ... sets classes: those in CLASSES, or all; and class_flags, a -d for each.
choose_classes() {
    set_names "${CLASSES:-}" "$@"
    classes=("${names[@]}")
    refuse_repeated CLASSES "${classes[@]}"
    set_class_flags "${classes[@]}"
}

# choose_numbers VARIABLE LEAST DEFAULT ... sets numbers: those in the variable, or the defaults; LEAST is 0 or 1.
choose_numbers() {
    local variable=$1 least=$2 name number
    shift 2
    set_names "${!variable:-}" "$@"
    numbers=()
    for name in "${names[@]}"; do
        number=$(whole_number "$name")
        if [ -z "$number" ] || [ "$least$number" = 10 ]; then
            complain "$variable has '$name', expected whole numbers from $least up separated by blanks," \
                "such as $variable=\"$*\""
            exit 2
        fi
        numbers+=("$number")
    done
    refuse_repeated "$variable" "${numbers[@]}"
}

# refuse_flags REASON OPTION ... ends the script if one of the options is among the flags.
refuse_flags() {
    local reason=$1 flag
    for flag in ${flags[@]+"${flags[@]}"}; do
        if is_one_of "${flag%%=*}" "${@:2}"; then
            complain "${flag%%=*} is $reason"
            exit 2
        fi
    done
}

set_class_flags() {
    local class
    class_flags=()
    for class in "$@"; do class_flags+=(-d "$class"); done
}

# group_name GROUP prints the log group of a recipe, which has another name with --offline or another seed: a typed one
# takes the place of a number at the end, _S0, but not of a word, as in FRONT_Screw.
group_name() {
    local name=$1
    if [ "$offline" = yes ]; then
        name=${name/WR50_L2-3/LITE0_B2-4}
        name=${name/Ensemble_L2-3/LiteEnsemble_B2-4}
    fi
    if [ -n "$typed_seed" ]; then
        if [ -n "$(whole_number "${name##*_S}")" ]; then name=${name%_S*}; fi
        name=${name}_S$typed_seed
    fi
    printf '%s\n' "$name"
}

# newest_run FOLDER NEEDED sets run_folder: of FOLDER, FOLDER_0, FOLDER_1, ... the last one that has the file NEEDED.
newest_run() {
    local candidate number highest=-1
    run_folder=
    if [ -e "$1/$2" ]; then run_folder=$1; fi
    for candidate in "$1"_*; do
        number=${candidate#"$1"_}
        case $number in '' | *[!0-9]*) continue ;; esac
        if [ "$number" -gt "$highest" ] && [ -e "$candidate/$2" ]; then
            highest=$number
            run_folder=$candidate
        fi
    done
    [ -n "$run_folder" ]
}

# free_name PATH sets free_name: PATH, or the first of PATH_0, PATH_1, ... that does not exist.
free_name() {
    local number=0
    free_name=$1
    while [ -e "$free_name" ]; do
        free_name=$1_$number
        number=$((number + 1))
    done
}

# find_models DATASET GROUP sets run_folder, model_flags and class_flags: the models of the newest run of the group.
find_models() {
    local class group script=${0##*/}
    group=$(group_name "$2")
    if ! newest_run "$RESULTS/$LOG_PROJECT/$group" models || ! list_models "$1"; then
        tell_not_trained "$group" "$RESULTS/$LOG_PROJECT" "${script/evaluation/training}"
        return "$NOT_TRAINED"
    fi
    printf 'models: %s\n' "$run_folder"
    model_flags=()
    for class in "${trained[@]}"; do model_flags+=(-p "$run_folder/models/$1_$class"); done
    set_class_flags "${trained[@]}"
}

# find_model DATASET CLASS FOLDER GROUP SCRIPT sets model: that of the class in the newest run of the group in FOLDER,
# where SCRIPT has trained it.
find_model() {
    local group
    group=$(group_name "$4")
    if ! newest_run "$3/$LOG_PROJECT/$group" "models/$1_$2"; then
        tell_not_trained "$group" "$3/$LOG_PROJECT" "$5"
        return "$NOT_TRAINED"
    fi
    model=$run_folder/models/$1_$2
    printf 'model: %s\n' "$model"
}

tell_not_trained() {
    printf 'no models of %s in %s: train them with %s\n' "$1" "$2" "$3" >&2
}

# list_models DATASET sets trained: CLASSES if given, else every class with a model in run_folder, in the usual order.
list_models() {
    local folder class
    trained=()
    for class in "${classes[@]}"; do
        if [ -n "${CLASSES:-}" ] || [ -d "$run_folder/models/$1_$class" ]; then trained+=("$class"); fi
    done
    if [ -n "${CLASSES:-}" ]; then return; fi
    for folder in "$run_folder/models/$1"_*; do
        class=${folder##*/"$1"_}
        if [ -d "$folder" ] && ! is_one_of "$class" "${classes[@]}"; then trained+=("$class"); fi
    done
    [ "${#trained[@]}" -gt 0 ]
}

# attempt NAME COMMAND ... runs a command; what fails is noted for `finish`, an interrupt ends the script.
attempt() {
    local name=$1 code=0 note=
    shift
    if [ "$offline" = yes ]; then note=' (offline backbones)'; fi
    printf '== %s%s\n' "$name" "$note"
    "$@" || code=$?
    case $code in
    0) num_done=$((num_done + 1)) ;;
    130) exit 130 ;;
    "$NOT_TRAINED") skipped+=("$name") ;;
    *) failed+=("$name") ;;
    esac
}

# run_variants runs the function of each chosen variant with the flags.
run_variants() {
    local variant
    for variant in "${variants[@]}"; do
        attempt "$variant" "$variant" ${flags[@]+"${flags[@]}"}
    done
    finish "${VARIANTS:-}"
}

# run_classes FUNCTION [PREFIX] runs a function for each chosen class with the class and the flags, under PREFIX<class>.
run_classes() {
    local class
    for class in "${classes[@]}"; do
        attempt "${2:-}$class" "$1" "$class" ${flags[@]+"${flags[@]}"}
    done
}

# finish [NAMES] ends the script: 1 if something failed or everything was skipped, or anything where NAMES asked for it.
finish() {
    local code=0
    if [ "${#skipped[@]}" -gt 0 ]; then
        if [[ ${1:-} = *[![:space:]]* ]] || [ "$num_done" -eq 0 ]; then
            complain "without models: ${skipped[*]}"
            code=1
        else
            printf 'skipped, never trained: %s\n' "${skipped[*]}"
        fi
    fi
    if [ "${#failed[@]}" -gt 0 ]; then
        complain "failed: ${failed[*]}"
        code=1
    fi
    exit "$code"
}
