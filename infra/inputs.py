"""The state machine's input: its fields, their defaults and their checks, as JSONata.

Every check is a condition and the sentence a user reads when it does not hold; see ``check``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from infra import code
from infra.config import (
    FEATURE_RECIPES,
    RECIPES,
    SCALES,
    STRATEGIES,
    WARM_START_TYPES,
    ConfigError,
    MachineInput,
    QualityGate,
    Range,
    StageConfig,
    Tuning,
)

FIELDS = tuple(MachineInput.model_fields)
WEIGHT_SUFFIXES = (".pth", ".pt", ".safetensors")
PICTURES = "incoming/"
UPLOADS = (PICTURES, "pretrained/")
"""Where users put pictures (the first) and weights (either) in the data bucket: the only places jobs may read them from."""
MAX_KEY = 180
"""Characters of a key given as source."""

# Set by the state machine itself, from other fields or from the search.
RESERVED_HYPERPARAMETERS = ("recipe", "backbone", "pretrained", "image_size", "learning_rate", "batch_size")

SCALARS = "['string', 'number', 'boolean']"
"""JSONata: the types a single hyperparameter may have."""

CACHED_HYPERPARAMETERS = ("resize_size", "feature_views", "horizontal_flip", "random_resized_crop_min_scale", "seed")
"""What CacheFeatures bakes into the features: a trial cannot change it afterwards."""

GRID_LEARNING_RATES = 4
"""Grid search knows only categories: so many learning rates between the smallest and the largest."""


def merge(config: StageConfig) -> str:
    """JSONata source of the input laid over the stage's defaults; groups of fields are merged one level deeper.

    Raises ConfigError when the defaults name a hyperparameter that the training code does not have.
    """
    _check_defaults(config)
    defaults = json.dumps(config.input.model_dump(mode="json"))
    groups = ", ".join(
        f"'{name}': $exists($given.{name}) ? ($type($given.{name}) = 'object' ? "
        f"$merge([$defaults.{name}, $given.{name}]) : $given.{name}) : $defaults.{name}"
        for name in ("hyperparameters", "tuning", "quality_gate")
    )
    return (
        f"($defaults := {defaults}; $given := $type($states.input) = 'object' ? $states.input : {{}}; "
        f"$merge([$defaults, $given, {{{groups}}}]))"
    )


def _check_defaults(config: StageConfig) -> None:
    """Found when the stage is synthesised rather than in its first execution."""
    groups: dict[str, Iterable[str]] = {
        "hyperparameters": config.input.hyperparameters,
        "tuning.ranges": config.input.tuning.ranges,
    }
    for group, given in groups.items():
        for name in given:
            if name not in _known_hyperparameters():
                known = ", ".join(_known_hyperparameters())
                raise ConfigError(f"cdk.json stage {config.stage}: input.{group} names {name}; expected names among {known}.")


def check(config: StageConfig) -> str:
    """JSONata source of one line that names every bad field, its value, and what was expected; empty when all is well."""
    parts = [*_unknown(), *_top_level(config), *_tuning(config), *_ranges(config), *_warm_start(), *_gate()]
    sentences = ", ".join([_is_object(), _run_name(), *parts])
    return (
        "($shown := function($value) { $substring($string($value), 0, 200) }; "
        "$bad := function($name, $value, $ok, $expected) "
        "{ $ok ? '' : $name & ' is ' & $shown($value) & '; expected ' & $expected & '.' }; "
        "$text := function($value) { $type($value) = 'string' ? $value : '' }; "
        "$whole := function($value, $low, $high) "
        "{ $type($value) = 'number' ? ($value = $floor($value) ? ($value >= $low ? $value <= $high : false) : false) : false }; "
        "$between := function($value, $low, $high) "
        "{ $type($value) = 'number' ? ($value >= $low ? $value <= $high : false) : false }; "
        "$names := function($value) { $type($value) = 'object' ? $append([], $keys($value)) : [] }; "
        "$i := $request; $t := $type($i.tuning) = 'object' ? $i.tuning : {}; "
        "$r := $type($t.ranges) = 'object' ? $t.ranges : {}; "
        "$q := $type($i.quality_gate) = 'object' ? $i.quality_gate : {}; "
        f"$join($append([], $filter([{sentences}], function($line) {{ $line != '' }})), ' '))"
    )


def _bad(name: str, value: str, condition: str, expected: str) -> str:
    """A call of ``$bad``; ``condition`` is JSONata, the rest is text (``value`` is JSONata)."""
    return f"$bad({json.dumps(name)}, {value}, {condition}, {json.dumps(expected)})"


def _all(values: str, good: str) -> str:
    """JSONata: whether ``good`` holds for each ``$value`` of a list.

    It counts the good ones: ``$filter`` answers a single match without its list, and a bad ``null`` or ``[]`` alone counts as none.
    """
    return f"$count($filter({values}, function($value) {{ {good} }})) = $count({values})"


def _is_object() -> str:
    """The input as a whole."""
    return _bad("The input", "$states.input", "$type($states.input) = 'object'", 'a JSON object such as {} or {"recipe": "head"}')


def _run_name() -> str:
    """The execution's name: it becomes a part of S3 keys and a tag, which take fewer characters than Step Functions does."""
    return _bad(
        "The execution's name", "$run", "$contains($run, /^[A-Za-z0-9._-]+$/)", "letters, digits, dots, hyphens and underscores"
    )


def _unknown() -> list[str]:
    """Names that nothing reads: most often typing errors."""
    groups = {
        "": ("$states.input", FIELDS),
        "tuning.": ("$i.tuning", tuple(Tuning.model_fields)),
        "quality_gate.": ("$i.quality_gate", tuple(QualityGate.model_fields)),
    }
    return [
        f"$join($append([], $map($filter($names({value}), function($name) {{ $not($name in {json.dumps(known)}) }}), "
        f"function($name) {{ '{group}' & $name & ' is unknown; expected one of {', '.join(known)}.' }})), ' ')"
        for group, (value, known) in groups.items()
    ]


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """A field with a few allowed words."""
    return _bad(name, value, f"{value} in {json.dumps(allowed)}", f"one of {', '.join(allowed)}")


def _top_level(config: StageConfig) -> list[str]:
    """The fields outside the groups."""
    known = _known_hyperparameters()
    return [
        _one_of("action", "$i.action", ("train", "deploy", "batch")),
        _bad("source", "$i.source", _source(config), _source_expectation(config)),
        _one_of("recipe", "$i.recipe", RECIPES),
        _bad(
            "backbone", "$i.backbone", "$contains($text($i.backbone), /^[a-z][a-z0-9_]*$/)", "a torchvision name such as resnet18"
        ),
        _bad("pretrained", "$i.pretrained", _pretrained(config), _pretrained_expectation(config)),
        _bad(
            "pretrained",
            "$i.pretrained",
            "$i.recipe != 'scratch' ? $i.pretrained != 'none' : true",
            "weights, because the recipe starts from a trained backbone; or choose recipe scratch",
        ),
        _bad("image_size", "$i.image_size", "$whole($i.image_size, 16, 1024)", "an integer from 16 to 1024"),
        _bad(
            "hyperparameters",
            "$i.hyperparameters",
            "$type($i.hyperparameters) = 'object'",
            'an object such as {"epochs": 10}',
        ),
        _bad(
            "hyperparameters",
            "$i.hyperparameters",
            _all("$names($i.hyperparameters)", f"$value in {json.dumps(known)}"),
            f"only names among {', '.join(known)}",
        ),
        _bad(
            "hyperparameters",
            "$i.hyperparameters",
            _all("$names($i.hyperparameters)", f"$type($lookup($i.hyperparameters, $value)) in {SCALARS}"),
            "texts, numbers, true or false as values",
        ),
        _bad(
            "model_package",
            "$i.model_package",
            "$i.action = 'deploy' or ($i.action = 'batch' and $not($i.model_package = '')) ? "
            f"$contains($text($i.model_package), ':model-package/{config.prefix}/') : $type($i.model_package) = 'string'",
            f"the ARN of a version in the model package group {config.prefix}, where action is deploy or batch",
        ),
        _bad("dry_run", "$i.dry_run", "$type($i.dry_run) = 'boolean'", "true or false"),
        _bad(
            "input",
            "$i.input",
            f"$i.action = 'batch' ? {_pictures(config, '$text($i.input)')} : $type($i.input) = 'string'",
            "a prefix with pictures for action batch: " + _source_expectation(config, archives=False),
        ),
    ]


def _known_hyperparameters() -> list[str]:
    """The training code's hyperparameters that the state machine does not set itself."""
    return [field for field in code.hyperparameters() if field not in RESERVED_HYPERPARAMETERS]


def _source(config: StageConfig) -> str:
    """Whether PrepareData may read the source."""
    hosts = json.dumps(list(config.allowed_hosts))
    return (
        "($contains($text($i.source), /^https:/) ? "
        f"$substringBefore($substringAfter($i.source, 'https://'), '/') in {hosts} : {_pictures(config, '$text($i.source)')})"
        # With the bucket's name before it, a job's argument has at most 256 characters.
        f" ? $length($i.source) <= ($contains($i.source, ':') ? 256 : {MAX_KEY}) : false"
    )


def _pictures(config: StageConfig, value: str) -> str:
    """Whether jobs may read pictures at a key of the data bucket or an ``s3://`` address; ``value`` is JSONata source."""
    buckets = json.dumps(list(config.source_buckets))
    uploads = f"$substring($key, 0, {len(PICTURES)}) = '{PICTURES}'"
    return (
        f"($s := {value}; $key := $substringAfter($s, 's3://${{DataBucket}}/'); $s = '' ? false : "
        "$contains($s, /^s3:/) ? ($contains($s, 's3://${DataBucket}/') ? "
        f"({uploads}) : $substringBefore($substringAfter($s, 's3://'), '/') in {buckets}) : "
        f"$contains($s, ':') ? false : ({uploads.replace('$key', '$s')}))"
    )


def _source_expectation(config: StageConfig, *, archives: bool = True) -> str:
    """What a source must look like."""
    hosts = ", ".join(config.allowed_hosts) or "none is configured"
    buckets = "".join(f", s3://{bucket}/…" for bucket in config.source_buckets)
    archive = f", or an https:// archive on an allowed host ({hosts})" if archives else ""
    return (
        f"a key prefix{' or archive' if archives else ''} in the data bucket that begins with {PICTURES}, "
        f"s3://${{DataBucket}}/incoming/…{buckets}{archive}; at most {MAX_KEY} characters for a key, 256 with ://"
    )


def _pretrained(config: StageConfig) -> str:
    """Whether the weights can be found by name, or by a key that jobs may read. Without a network there is no download by name."""
    names = ["none"] if config.network.isolation else ["torchvision", "none"]
    suffixes = "|".join(suffix.removeprefix(".") for suffix in WEIGHT_SUFFIXES)
    uploads = "|".join(UPLOADS).replace("/", "\\/")
    return (
        "($p := $text($i.pretrained); $p in " + json.dumps(names) + " ? true : "
        "($k := $contains($p, 's3://${DataBucket}/') ? $substringAfter($p, 's3://${DataBucket}/') : $p; "
        f"$contains($k, /^({uploads})/) and $contains($k, /\\.({suffixes})$/)))"
    )


def _pretrained_expectation(config: StageConfig) -> str:
    """What the field must look like."""
    names = "none" if config.network.isolation else "torchvision, none,"
    return f"{names} or a key in the data bucket that begins with {' or '.join(UPLOADS)} and ends with {', '.join(WEIGHT_SUFFIXES)}"


def _tuning(config: StageConfig) -> list[str]:
    """The fields of ``tuning``."""
    rate = (
        "$count($t.learning_rate) = 2 ? ($between($t.learning_rate[0], 0.0000001, 10) ? "
        "($between($t.learning_rate[1], 0.0000001, 10) ? $t.learning_rate[0] < $t.learning_rate[1] : false) : false) : false"
    )
    sizes = _all("$t.batch_size", "$whole($value, 1, 8192)")
    listed = f"$type($t.batch_size) = 'array' ? ($count($t.batch_size) > 0 ? {sizes} : false) : false"
    return [
        _bad("tuning", "$i.tuning", "$type($i.tuning) = 'object'", 'an object such as {"max_jobs": 8}'),
        _one_of("tuning.strategy", "$t.strategy", STRATEGIES),
        _bad(
            "tuning.max_jobs",
            "$t.max_jobs",
            f"$whole($t.max_jobs, 1, {config.max_trials})",
            f"an integer from 1 to {config.max_trials}",
        ),
        _bad(
            "tuning.max_parallel_jobs", "$t.max_parallel_jobs", "$whole($t.max_parallel_jobs, 1, 100)", "an integer from 1 to 100"
        ),
        _bad("tuning.learning_rate", "$t.learning_rate", rate, "[smallest, largest] with 0 < smallest < largest <= 10"),
        _bad("tuning.batch_size", "$t.batch_size", listed, "a list of integers from 1 to 8192, such as [64, 128, 256]"),
        _one_of("tuning.early_stopping", "$t.early_stopping", ("Off", "Auto")),
    ]


def _ranges(config: StageConfig) -> list[str]:
    """``tuning.ranges``: known names, forms that SageMaker can search, and a grid that is not larger than the stage allows."""
    names = "$append([], $keys($r))"
    baked = [name for name in CACHED_HYPERPARAMETERS if name in _known_hyperparameters()]
    lists_only = _all(names, "$type($lookup($r, $value)) = 'array'")
    values = f"$append([], $map({names}, function($name) {{ $count($lookup($r, $name)) }}))"
    trials = f"$reduce($append([{GRID_LEARNING_RATES}, $count($t.batch_size)], {values}), function($a, $b) {{ $a * $b }})"
    return [
        _bad(
            "tuning.ranges",
            "$t.ranges",
            "$type($t.ranges) = 'object' ? $count($keys($r)) <= 20 : false",
            'an object with at most 20 names, such as {"weight_decay": {"min": 0.00001, "max": 0.01}}',
        ),
        _each_range(
            f"$not($name in {json.dumps(_known_hyperparameters())})", f"a name among {', '.join(_known_hyperparameters())}"
        ),
        _each_range(
            f"$i.recipe in {json.dumps(FEATURE_RECIPES)} ? $name in {json.dumps(baked)} : false",
            "no range: the recipe's features are computed once, before the search; give one value in hyperparameters",
        ),
        _each_range(f"$not({_searchable()})", _searchable_expectation()),
        _bad(
            "tuning.strategy",
            "$t.strategy",
            f"$t.strategy = 'Grid' ? {lists_only} : true",
            "Bayesian, Random or Hyperband, or only lists of values in tuning.ranges",
        ),
        _bad(
            "The number of trials of the grid",
            trials,
            f"$t.strategy = 'Grid' ? ({lists_only} ? {trials} <= {config.max_trials} : true) : true",
            f"at most {config.max_trials}; give fewer values in tuning.batch_size and tuning.ranges",
        ),
    ]


def _each_range(wrong: str, expected: str) -> str:
    """A sentence for each range of which ``wrong`` holds; ``$name`` and ``$one`` are its name and its content there."""
    return (
        f"$join($append([], $map($append([], $keys($r)), function($name) {{ ($one := $lookup($r, $name); ({wrong}) ? "
        f"$bad('tuning.ranges.' & $name, $one, false, {json.dumps(expected)}) : '') }})), '')"
    )


def _searchable() -> str:
    """JSONata: whether SageMaker can search the range ``$one``: a list, or two numbers with a scale that fits them."""
    unknown = f"function($key) {{ $not($key in {json.dumps(tuple(Range.model_fields))}) }}"
    return (
        "($type($one) = 'array' ? "
        f"($count($one) > 0 ? ($count($one) <= 30 ? {_all('$one', f'$type($value) in {SCALARS}')} : false) : false) : "
        "$type($one) != 'object' ? false : "
        f"$count($filter($append([], $keys($one)), {unknown})) > 0 ? false : "
        # A comparison with something missing is false in JSONata, unequal included: hence $not.
        "$not($type($one.min) = 'number') ? false : $not($type($one.max) = 'number') ? false : $one.min >= $one.max ? false : "
        "($scale := $exists($one.scale) ? $one.scale : 'Auto'; $integer := $exists($one.integer) ? $one.integer : false; "
        f"$not($scale in {json.dumps(SCALES)}) ? false : $type($integer) != 'boolean' ? false : "
        "$scale = 'Logarithmic' and $one.min <= 0 ? false : "
        "$scale = 'ReverseLogarithmic' and ($integer or $one.min < 0 or $one.max >= 1) ? false : "
        "$integer ? ($one.min = $floor($one.min) and $one.max = $floor($one.max)) : true))"
    )


def _searchable_expectation() -> str:
    """What a range must look like."""
    return (
        'a list of 1 to 30 values, or {"min", "max", "scale", "integer"} with min < max, whole numbers where integer is true, '
        f"scale one of {', '.join(SCALES)}; Logarithmic needs min > 0, ReverseLogarithmic numbers from 0 to below 1"
    )


def _warm_start() -> list[str]:
    """``tuning.warm_start``: names of earlier tuning jobs. SageMaker documents it for two strategies."""
    named = _all("$t.warm_start", "$contains($text($value), /^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,31}$/)")
    names = f"$type($t.warm_start) = 'array' ? ($count($t.warm_start) <= 5 ? {named} : false) : false"
    return [
        _bad("tuning.warm_start", "$t.warm_start", names, "a list of at most 5 names of earlier tuning jobs, such as []"),
        _one_of("tuning.warm_start_type", "$t.warm_start_type", WARM_START_TYPES),
        _bad(
            "tuning.strategy",
            "$t.strategy",
            "$count($t.warm_start) > 0 ? $t.strategy in ['Bayesian', 'Random'] : true",
            "Bayesian or Random, because tuning.warm_start names earlier jobs; or leave warm_start out",
        ),
    ]


def _gate() -> list[str]:
    """The fields of ``quality_gate``."""
    return [
        _bad("quality_gate", "$i.quality_gate", "$type($i.quality_gate) = 'object'", 'an object such as {"min_top1": 0.8}'),
        _bad("quality_gate.min_top1", "$q.min_top1", "$between($q.min_top1, 0, 1)", "a number from 0 to 1"),
        _bad("quality_gate.max_drop", "$q.max_drop", "$between($q.max_drop, 0, 1)", "a number from 0 to 1"),
    ]
