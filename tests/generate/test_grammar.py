"""Answers that follow a grammar: any logits, several tokenizers, every path, hostile grammars."""

import dataclasses
import gc
import json
import re
import sys
import weakref

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

import lapilli
from lapilli.config.generation import SamplingParams
from lapilli.config.grammar import Grammar, as_grammar
from lapilli.errors import GenerationError, GrammarError
from lapilli.generate import grammar as module
from lapilli.generate.engine import Engine
from lapilli.generate.grammar import GrammarProposer, compiled, compiler_of
from lapilli.generate.output import GenerationState
from lapilli.generate.reference import generate
from lapilli.generate.sampler import Sampler, SamplingState
from lapilli.prompt.tokenizer import TokenizerFiles, build_tokenizer
from tests.generate.conftest import WordTokenizer
from tests.generate.engine.agreement import assert_same
from tests.generate.engine.conftest import SMALL, alone, build, request_of

CPU = torch.device("cpu")
SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square"]},
        "note": {"type": "string", "maxLength": 6},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["shape", "note", "count"],
    "additionalProperties": False,
}


@dataclasses.dataclass
class ByteTokenizer(WordTokenizer):
    """Every byte is a token; 256 ends an answer, unless it has no end at all."""

    vocab_size: int = 257

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def decode(self, ids) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def byte_level() -> lapilli.prompt.tokenizer.Tokenizer:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(
        ['{"shape": "circle", "note": "a red é", "count": 12}'] * 9, trainer
    )
    config = {"eos_token": "<end>"}
    return build_tokenizer(TokenizerFiles(json=library.to_str(), config=config), fast=True)


@pytest.fixture(scope="module")
def chat() -> lapilli.Chat:
    return lapilli.load("pebble", device="cpu")


@pytest.fixture(scope="module")
def tokenizers(chat):
    return {"sentencepiece": chat.tokenizer, "byte level": byte_level(), "bytes": ByteTokenizer()}


NAMES = ["sentencepiece", "byte level", "bytes"]


def walk(tokenizer, schema, number: int, *, limit: int = 400, **options):
    """The answer of a model whose logits are noise."""
    params = SamplingParams.from_options(schema=schema, max_new_tokens=limit, **options)
    width = tokenizer.vocab_size + 3  # a model may have more rows than the tokenizer has tokens
    answer = GenerationState(tokenizer, params, eos_ids=None, room=limit)
    matcher = compiled(params.grammar, tokenizer, width).matcher(answer.stop_ids)
    state = SamplingState(params, width, CPU, matcher=matcher)
    noise = torch.Generator().manual_seed(number)
    while not answer.is_finished:
        logits = torch.randn(1, width, generator=noise)
        token_id, report = Sampler(logits).sample(0, state)
        answer.push(token_id, report, is_whole=state.is_over)
    return answer.result()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_noise_becomes_json_of_the_schema(name, seed, tokenizers):
    answer = walk(tokenizers[name], SCHEMA, seed)
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.text), SCHEMA)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schema", [["red", "red star", "ünï 🙂", 'quo"te\n'], "[0-9]{3}( é)?x+y"])
def test_noise_becomes_a_choice_or_a_match(name, schema, tokenizers):
    texts = {walk(tokenizers[name], schema, seed, temperature=1.0).text for seed in range(9)}
    if isinstance(schema, list):
        assert texts <= set(schema)
    else:
        assert all(re.fullmatch(schema, text) for text in texts)
    assert len(texts) > 1


def test_a_space_at_the_beginning_is_kept_where_the_tokenizer_can(tokenizers):
    for name, tokenizer in tokenizers.items():
        kept = " a" if name != "sentencepiece" else "a"  # its decode drops two
        assert walk(tokenizer, [" a"], 0).text == kept


def test_a_grammar_of_lark(tokenizers):
    grammar = Grammar.lark('start: NAME ": " %json {"type": "boolean"}\nNAME: /[a-c]{2}/')
    for tokenizer in tokenizers.values():
        assert re.fullmatch("[abc]{2}: (true|false)", walk(tokenizer, grammar, 1).text)


def test_white_space_is_as_the_schema_asks(tokenizers):
    loose = SCHEMA | {"x-guidance": {"whitespace_flexible": True}}
    texts = [walk(tokenizers["bytes"], loose, seed).text for seed in range(5)]
    assert any(len(text.split()) > 6 for text in texts)
    assert '", "note": "' in walk(tokenizers["bytes"], SCHEMA, 0).text


values = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda n: {"type": "integer", "minimum": -n, "maximum": n}, st.integers(0, 2000)),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 9)),
    st.builds(lambda names: {"enum": names}, st.lists(st.text(max_size=4), min_size=1, max_size=4)),
    st.just({"type": "string", "pattern": "^[a-f]{2,5}$"}),
)
schemas = st.recursive(
    values,
    lambda inner: st.one_of(
        st.builds(lambda one: {"type": "array", "items": one, "maxItems": 2}, inner),
        st.builds(
            lambda parts, few: {
                "type": "object",
                "properties": parts,
                "required": sorted(parts)[: len(parts) // 2 if few else None],
                "additionalProperties": False,
            },
            st.dictionaries(st.text("abé_ ", min_size=1, max_size=4), inner, max_size=3),
            st.booleans(),
        ),
    ),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(schema=schemas, name=st.sampled_from(NAMES), seed=st.integers(0, 99))
def test_any_schema_is_followed_with_any_tokenizer(schema, name, seed, tokenizers):
    answer = walk(tokenizers[name], schema, seed, temperature=1.5, seed=seed)
    if answer.finish_reason == "stop":
        jsonschema.validate(json.loads(answer.text), schema)
    else:
        assert answer.finish_reason == "length"


@settings(max_examples=12, deadline=None)
@given(schema=schemas)
def test_any_schema_is_followed_by_a_model(schema, chat):
    text = chat.ask("What is it?", schema=schema, max_new_tokens=150)
    if chat.last.finish_reason == "stop":
        # Not the text of `ask`, which has no white space around it: json.loads does not mind.
        jsonschema.validate(json.loads(text), schema)
    else:
        assert chat.last.finish_reason == "length"


def test_an_answer_ends_where_its_grammar_does(tokenizers):
    for tokenizer in tokenizers.values():
        answer = walk(tokenizer, ["yes"], 0)
        assert (answer.text, answer.finish_reason) == ("yes", "stop")
        assert answer.token_ids[-1] != tokenizer.eos_id  # which would cost a pass
        length = len(answer.token_ids)
        assert walk(tokenizer, ["yes"], 0, limit=length).finish_reason == "stop"
        if length > 1:
            assert walk(tokenizer, ["yes"], 0, limit=length - 1).finish_reason == "length"


def test_stop_tokens_end_an_answer_only_where_its_grammar_may_end(tokenizers):
    tokenizer = tokenizers["bytes"]
    ends = {"stop_token_ids": [ord("a"), ord("b"), 256]}
    for seed in range(20):
        answer = walk(tokenizer, "[a-d]{3}[a-d]*", seed, **ends, limit=60)
        assert len(answer.text) >= 3
        assert answer.finish_reason == "stop"
        assert not {"a", "b"} & set(answer.text)
    with pytest.raises(GenerationError, match="cannot go on"):
        walk(tokenizer, "[ab]", 0, **ends)


def test_penalties_and_bias_change_no_more_than_what_is_allowed(tokenizers):
    options = {"logit_bias": {ord("x"): 100.0, ord("c"): 100.0}, "repetition_penalty": 2.0}
    assert walk(tokenizers["bytes"], "[abc]{5}", 0, **options).text == "ccccc"


def test_log_probabilities_are_the_model_s_own(chat):
    chat.ask("What is it?", schema=["yes", "no"], logprobs=2)
    told = chat.last.logprobs
    assert len(told) == len(chat.last.token_ids)
    assert all(one.logprob > -float("inf") for one in told)
    assert all(number > -float("inf") for one in told for _, number in one.top)


class Recorder:
    """A proposer that says the same wrong tokens every time."""

    def __init__(self) -> None:
        self.calls = 0

    def propose(self, keys, most, is_worth):
        self.calls += 1
        return [ord("d"), ord("e"), ord("!"), ord("f")][:most]


def test_forced_tokens_are_drafts(tokenizers):
    tokenizer = tokenizers["bytes"]
    matcher = compiled(as_grammar("abc[d-z]{9}"), tokenizer, 257).matcher([256])
    proposer = GrammarProposer(matcher, Recorder())
    assert bytes(proposer.propose([1], 9, lambda _: True)) == b"abc"
    assert bytes(proposer.propose([1], 2, lambda _: True)) == b"ab"
    assert proposer.propose([1], 9, lambda _: False)[:1] != [ord("a")]
    for token in b"abc":
        matcher.consume(token)
    assert bytes(proposer.propose([1], 9, lambda _: True)) == b"de"  # without what is forbidden


def test_masks_do_not_depend_on_whether_forced_tokens_were_asked_for(tokenizers):
    for tokenizer in tokenizers.values():
        width = tokenizer.vocab_size
        grammar = compiled(as_grammar(SCHEMA), tokenizer, width)
        one, other = grammar.matcher([]), grammar.matcher([])
        for _ in range(400):
            if one.is_over:
                break
            other.forced()
            masks = [
                module.fill_masks([(0, m, ())], rows=1, vocab_size=width) for m in (one, other)
            ]
            assert masks[0].equal(masks[1])
            flags = module.unpack_masks(masks[0], width, CPU)[0]
            token = int(flags.nonzero()[0])
            one.consume(token)
            other.consume(token)
        assert one.is_over
        assert other.is_over


def test_masks_of_draft_tokens_are_those_of_one_token_at_a_time(tokenizers):
    tokenizer = tokenizers["bytes"]
    grammar = compiled(as_grammar("ab(c|d)e*"), tokenizer, 257)
    drafted = grammar.matcher([256])
    masks = module.fill_masks([(1, drafted, list(b"abd"))], rows=6, vocab_size=257)
    flags = module.unpack_masks(masks, 257, CPU)
    assert flags[0].all()
    assert flags[5].all()
    single = grammar.matcher([256])
    for at, token in enumerate([*b"abd", None], 1):
        [expected] = module.unpack_masks(
            module.fill_masks([(0, single, ())], rows=1, vocab_size=257), 257, CPU
        )
        assert flags[at].equal(expected)
        if token is not None:
            single.consume(token)
    assert flags[4].nonzero().flatten().tolist() == [ord("e"), 256]


def test_special_tokens_are_never_allowed(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    width = tokenizer.vocab_size
    matcher = compiled(as_grammar("(?s:.*)"), tokenizer, width).matcher([tokenizer.eos_id])
    matcher.consume(tokenizer.encode("a", add_bos=False)[0])
    [flags] = module.unpack_masks(
        module.fill_masks([(0, matcher, ())], rows=1, vocab_size=width), width, CPU
    )
    allowed = set(flags.nonzero().flatten().tolist())
    assert allowed & tokenizer.special_ids == {tokenizer.eos_id}
    assert len(allowed) > width - 100  # bytes that begin no character are not


def test_a_tokenizer_may_have_more_tokens_than_the_model():
    tokenizer = ByteTokenizer()
    matcher = compiled(as_grammar("[a-z]?"), tokenizer, 100).matcher([99])
    [flags] = module.unpack_masks(
        module.fill_masks([(0, matcher, ())], rows=1, vocab_size=100), 100, CPU
    )
    assert flags.nonzero().flatten().tolist() == [97, 98, 99]


@pytest.mark.skipif(sys.byteorder != "little", reason="llguidance writes words of this machine")
def test_both_ways_to_unpack_agree():
    masks = torch.randint(-(2**31), 2**31 - 1, (3, 5), dtype=torch.int32)
    ours = module.unpack_masks(masks, 150, CPU)
    shifts = torch.arange(32, dtype=torch.int32)
    assert ours.equal((masks.unsqueeze(-1) >> shifts & 1).flatten(1)[:, :150].bool())


BOMBS = {
    "repetitions": "(a{1000}){1000}{1000}",
    "more repetitions": "((a|b)*c){500}.{5000}",
    "one large repetition": "a{1000000000}",
    "many states": "(a|b)*a(a|b){40}",
    "letters of Unicode": r"[^\p{L}]{200}\p{Lu}{200}",
    "parentheses": "(" * 20000 + "a" + ")" * 20000,
    "itself": {"$ref": "#"},
    "a file": {"$ref": "file:///etc/hosts"},
    "long arrays": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "long strings": {"type": "string", "minLength": 10**9},
    "doubled references": {
        "$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)}
        | {"d60": {"type": "integer"}},
        "$ref": "#/$defs/d0",
    },
    "doubled conditions": {
        "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
        | {"d40": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
        "$ref": "#/$defs/d0",
    },
    "a product": {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for j in range(6)]}
            for i in range(8)
        ]
    },
    "optional keys": {"properties": {f"p{i}": {} for i in range(1000)}, "type": "object"},
    "many values": {"enum": [f"v{i}" for i in range(20000)]},
    "an ambiguous grammar": Grammar.lark('start: e\ne: e e | e e e | "a" | ""'),
    "a doubled grammar": Grammar.lark(
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(40)) + '\nr40: "a"|"b"'
    ),
    "an intersection": Grammar.lark("start: A\nA: /.*a.{30}.*/ & /.*b.{29}.*/ & /.*c.{28}/"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_grammar_is_refused_or_runs(name, tokenizers):
    """What runs on for ever, or takes the machine's memory, ends by the time limit of a test."""
    failure = None
    try:
        answer = walk(tokenizers["sentencepiece"], BOMBS[name], 1, limit=60)
    except GenerationError as error:
        failure = str(error)
    if failure is None:
        assert answer.finish_reason in ("stop", "length")
    else:
        assert re.search("cannot be followed|cannot go on", failure)
        assert not re.search("verbose|NoExtension|lexer|lexeme|fuel|[Ii]tems", failure), failure
        assert len(failure) < 1000


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "#"}, "contain the schema again"),
        (
            {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
            "contain the schema again",
        ),
        (
            {
                "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
                "$ref": "#/$defs/a",
            },
            "contain the schema again",
        ),
        (r"[^\s\S]", "nothing matches it"),
        ({"type": "string", "pattern": "^(([a-z]{1,500}){1,500}){1,500}$"}, "takes too much time"),
    ],
    ids=str,
)
def test_what_nothing_can_match_is_said_in_plain_words(schema, message, tokenizers):
    with pytest.raises(GrammarError, match=message) as found:
        walk(tokenizers["bytes"], schema, 1, limit=4000)
    assert not re.search("verbose|NoExtension|lexer|lexeme|fuel|[Ii]tems", str(found.value))


def test_a_part_that_cannot_be_followed_is_named_instead_of_the_whole(tokenizers):
    part = Grammar.json_schema({"$ref": "#"}, "the schema of the tool 'paint'")
    fine = Grammar.json_schema({"type": "null"}, "the schema of the tool 'clear'")
    rules = f"start: a | b\na: %json {fine.text}\nb: %json {part.text}"
    whole = Grammar("lark", rules, parts=(fine, part))
    with pytest.raises(GrammarError, match=r"^the schema of the tool 'paint' cannot be"):
        compiled(whole, tokenizers["bytes"], 257)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("[a", r"the regular expression cannot be followed: .*unclosed"),
        ("(?=a)b", "look-around"),
        ({"type": "foo"}, "the JSON schema cannot be followed: .*foo"),
        ({"if": {}}, r'the JSON schema cannot be followed: .*\["if"\]'),
        (Grammar.lark("start: x"), "the Lark grammar cannot be followed: .*unknown name"),
    ],
    ids=str,
)
def test_a_wrong_grammar_is_refused_by_every_path(schema, message, chat, model):
    with pytest.raises(GrammarError, match=message):
        chat.ask("What is it?", schema=schema)
    with pytest.raises(GrammarError, match=message):
        chat.ask_many(["What is it?"], schema=schema)
    with pytest.raises(GrammarError, match=message):
        alone(model, request_of([1], schema=schema))
    engine = Engine(model, WordTokenizer(), options=SMALL)
    with pytest.raises(GrammarError, match=message):
        engine.submit(request_of([1], schema=schema))
    assert not engine.has_work


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    module._library.cache_clear()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    try:
        with pytest.raises(GrammarError, match=r'pip install "lapilli\[grammar\]"'):
            compiled(as_grammar("a"), ByteTokenizer(), 257)
    finally:
        module._library.cache_clear()
    assert compiled(None, ByteTokenizer(), 257) is None


def test_a_compiler_is_made_once_and_let_go_with_its_tokenizer():
    tokenizer = ByteTokenizer()
    compiler = compiler_of(tokenizer, 257)
    assert compiler_of(tokenizer, 257) is compiler
    assert compiler.compile(as_grammar("a")) is compiler.compile(as_grammar("a"))
    tokenizer.vocab_size = 300
    assert compiler_of(tokenizer, 300) is not compiler
    gone = weakref.ref(compiler)
    del compiler, tokenizer
    gc.collect()
    assert gone() is None


def test_a_state_without_its_matcher_is_a_bug_that_shows():
    with pytest.raises(RuntimeError, match="not compiled"):
        SamplingState(SamplingParams.from_options(schema="a"), 257, CPU)


class LetterTokenizer(WordTokenizer):
    """Every id is its own letter, from A on."""

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([65 + token_id])

    def decode(self, ids) -> str:
        return bytes(65 + i for i in ids).decode()


def answer_alone(model, request, eos_ids):
    with torch.inference_mode():
        batch = model.embed_prompts([request.prompt], [request.media])
    [answer] = generate(model, batch, request.params, tokenizer=LetterTokenizer(), eos_ids=eos_ids)
    return answer


@pytest.fixture(scope="module")
def small():
    """A tiny model of letters."""
    return build()


ROWS = [
    {"schema": "(B|C|D){5}EFGHI*"},
    {"schema": "(BCDE|J)+", "temperature": 1.0, "seed": 3},
    {"schema": ["FGHIJ", "K"], "frequency_penalty": 1.0},
    {},
    {"temperature": 0.9, "seed": 4},
]


@pytest.mark.parametrize("speculate", ["off", "on"])
@pytest.mark.parametrize("mode", ["off", "static"])
def test_the_engine_answers_like_the_plain_loop(speculate, mode, small):
    requests = [
        request_of([at + 1, 2, 3], max_new_tokens=12, **options)
        for at, options in enumerate(ROWS * 4)
    ]
    limits = dataclasses.replace(SMALL, speculate=speculate, compile=mode, max_rows=20)
    engine = Engine(small, LetterTokenizer(), options=limits, eos_ids=[50])
    for ours, request in zip(engine.run(requests), requests, strict=True):
        theirs = answer_alone(small, request, [50])
        if request.params.grammar is not None:
            assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        else:
            assert_same(ours, theirs, small, request)


def test_forced_tokens_save_passes(small):
    passes = {}
    for speculate in ("off", "on"):
        limits = dataclasses.replace(SMALL, speculate=speculate)
        engine = Engine(small, LetterTokenizer(), options=limits)
        handle = engine.submit(request_of([1], schema="BCDEFGH", max_new_tokens=20))
        passes[speculate] = 1
        while engine.step():
            passes[speculate] += 1
        assert handle.generation.token_ids == (1, 2, 3, 4, 5, 6, 7)
    assert passes["on"] < passes["off"] == 7


def test_a_request_that_cannot_go_on_fails_alone(small):
    engine = Engine(small, LetterTokenizer(), options=SMALL)
    # H is needed, and ends this answer: so nothing is allowed.
    wrong = engine.submit(request_of([1], schema="BHC", stop_token_ids=[7]))
    good = engine.submit(request_of([2], schema="BHC"))
    while engine.step():
        pass
    assert good.generation.token_ids == (1, 7, 2)
    with pytest.raises(GrammarError, match="cannot go on as the regular expression asks"):
        wrong.generation  # noqa: B018  raises


def test_a_stream_says_what_ask_says(chat):
    questions = [{"schema": SCHEMA}, {"schema": SCHEMA, "temperature": 1.2, "seed": 5}, {}]
    for options in questions:
        chat.reset()
        whole = chat.ask("What is it?", max_new_tokens=80, **options)
        chat.reset()
        assert "".join(chat.stream("What is it?", max_new_tokens=80, **options)).strip() == whole


def test_many_questions_at_once_follow_the_schema(chat):
    texts = chat.ask_many(
        [f"What is it, for the time {at}?" for at in range(17)],
        schema=SCHEMA,
        temperature=1.0,
        max_new_tokens=100,
    )
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_every_form_of_a_schema_in_a_chat(chat):
    assert chat.ask("Is it?", schema=["yes", "no"]) in ("yes", "no")
    assert re.fullmatch("[0-9]{2}", chat.ask("Is it?", schema="[0-9]{2}"))
    with pytest.raises(GenerationError, match="beams"):
        chat.ask("Is it?", schema="a", num_beams=2)
    with pytest.raises(GrammarError, match="schema must be"):
        chat.ask("Is it?", schema=3)
    conversation = [lapilli.Message.user("Is it?")]
    params = SamplingParams.from_options(schema=["yes", "no"])
    assert chat.answer(conversation, params).text in ("yes", "no")
    [(_, answer)] = chat.as_completed([conversation], params)
    assert answer.text in ("yes", "no")
