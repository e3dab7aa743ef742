"""llama.cpp by llama-cpp-python's low-level functions: mtmd for pictures, then llama_decode.

The order is that of llama.cpp's own programs (mtmd_helper_eval_chunks; the slots of its server):
BOS, the picture's embeddings and the text are three passes; several requests are read one after
the other and then grow together, one batch with a token of each. What a slot holds is used again
when the next question begins with the same pictures. Keys and values in float16, attention by
llama.cpp's choice (flash), context only as long as needed.
"""

import ctypes
import json
import sys
import time
from collections.abc import Sequence

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp

from benchmarks.engines import Options
from benchmarks.figures import Question

BOS = 1
UBATCH = 1024  # the picture in one pass; 512, the default, is as fast


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    """llama.cpp says a lot; errors (level 4) are passed on."""
    del data
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


class LlamaCpp:
    """One model, and a context that is made again when more sequences are asked for."""

    def __init__(self, options: Options) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p())
        mtmd_cpp.mtmd_log_set(_silent, ctypes.c_void_p())
        mtmd_cpp.mtmd_helper_log_set(_silent, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        folder = options.files / "gguf"
        self._options = options
        kind, _, self._variant = options.kind.partition("-")
        self._model = llama_cpp.llama_model_load_from_file(
            str(folder / f"{kind}.gguf").encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {options.kind}")
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu = False
        params.n_threads = options.threads
        params.warmup = False
        self._tower = mtmd_cpp.mtmd_init_from_file(
            str(folder / "mmproj.gguf").encode(), self._model, params
        )
        if not self._tower:
            raise SystemExit("llama.cpp cannot load the tower")
        config = json.loads((options.files / "float" / "config.json").read_text())
        self.side = int(config["vision_config"]["image_size"])
        self._vocabulary = int(config["text_config"]["vocab_size"])
        known = json.loads((folder / "complete.json").read_text())
        self.facts = {"weight_bytes": float(known[kind])}
        self._rows = 0
        self._context: int | None = None
        self._held: dict[int, tuple[bytes, ...]] = {}

    def look(self, picture: bytes) -> None:
        """Tower and projector."""
        chunks, [media] = self._chunks([picture])
        self._encode(media)
        mtmd_cpp.mtmd_input_chunks_free(chunks)

    def answer(self, questions: Sequence[Question], new_tokens: int) -> list[list[float]]:
        """Read one after the other, then all grow together."""
        self._make_context(len(questions))
        started = time.perf_counter()
        ends, tokens, times = [], [], []
        for row, question in enumerate(questions):
            ends.append(self._read(row, question))
            tokens.append(self._best(-1))
            times.append([time.perf_counter() - started])
        batch = llama_cpp.llama_batch_init(len(questions), 0, 1)
        for _ in range(new_tokens - 1):
            batch.n_tokens = len(questions)
            for row, token in enumerate(tokens):
                self._place(batch, row, token=token, position=ends[row], sequence=row, logits=True)
                ends[row] += 1
            self._decode(batch)
            tokens = [self._best(row) for row in range(len(questions))]
            now = time.perf_counter() - started
            for moments in times:
                moments.append(now)
        llama_cpp.llama_batch_free(batch)
        return times

    def logits(self, question: Question) -> np.ndarray:
        """Of the first answer token, to be compared with other engines'."""
        self._make_context(1)
        self._read(0, question)
        pointer = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._vocabulary,)).copy()

    def _make_context(self, rows: int) -> None:
        """As many sequences as asked for: a context for more would count as memory of one."""
        if rows == self._rows:
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = rows * self._options.positions
        params.n_batch = 2048
        params.n_ubatch = UBATCH
        params.n_seq_max = rows
        params.n_threads = params.n_threads_batch = self._options.threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
        if self._variant == "noflash":
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp has no context of {params.n_ctx} positions")
        self._rows, self._held = rows, {}

    def _read(self, row: int, question: Question) -> int:
        """Positions of the prompt, read into sequence `row`; pictures it holds are not read again.

        The text takes the last positions, so what follows the pictures is dropped from before.
        """
        memory = llama_cpp.llama_get_memory(self._context)
        keeps = bool(question.pictures) and self._held.get(row) == question.pictures
        chunks, media = self._chunks(question.pictures)
        past = 1 + sum(mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk) for chunk in media)
        llama_cpp.llama_memory_seq_rm(memory, row, past if keeps else -1, -1)
        if not keeps:
            past = self._read_text(row, (BOS,), 0)
            for chunk in media:
                past = self._read_picture(row, chunk, past)
            self._held[row] = question.pictures
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        return self._read_text(row, question.text, past)

    def _read_text(self, row: int, ids: Sequence[int], past: int) -> int:
        batch = llama_cpp.llama_batch_init(2048, 0, 1)
        for start in range(0, len(ids), 2048):
            part = ids[start : start + 2048]
            batch.n_tokens = len(part)
            for at, token in enumerate(part):
                is_last = start + at == len(ids) - 1
                self._place(
                    batch,
                    at,
                    token=token,
                    position=past + start + at,
                    sequence=row,
                    logits=is_last,
                )
            self._decode(batch)
        llama_cpp.llama_batch_free(batch)
        return past + len(ids)

    def _read_picture(self, row: int, chunk: int, past: int) -> int:
        self._encode(chunk)
        now = llama_cpp.llama_pos(past)
        error = mtmd_cpp.mtmd_helper_decode_image_chunk(
            self._tower,
            self._context,
            chunk,
            mtmd_cpp.mtmd_get_output_embd(self._tower),
            past,
            row,
            2048,
            ctypes.byref(now),
            ctypes.cast(None, mtmd_cpp.mtmd_helper_post_decode_callback),
            None,
        )
        if error:
            raise SystemExit(f"llama.cpp could not read the picture: error {error}")
        return int(now.value)

    def _encode(self, chunk: int) -> None:
        if mtmd_cpp.mtmd_encode_chunk(self._tower, chunk):
            raise SystemExit("llama.cpp could not look at the picture")

    def _chunks(self, pictures: Sequence[bytes]) -> tuple[int, list[int]]:
        """mtmd's view of pictures: the list to free, and its media."""
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        marks = mtmd_cpp.mtmd_default_marker() * len(pictures)
        text = mtmd_cpp.mtmd_input_text(marks, len(marks), False, True)
        bitmaps = [self._bitmap(picture) for picture in pictures]
        many = (mtmd_cpp.mtmd_bitmap_p_ctypes * max(1, len(bitmaps)))(*bitmaps)
        error = mtmd_cpp.mtmd_tokenize(self._tower, chunks, ctypes.byref(text), many, len(bitmaps))
        for bitmap in bitmaps:
            mtmd_cpp.mtmd_bitmap_free(bitmap)
        if error:
            raise SystemExit(f"llama.cpp could not prepare the picture: error {error}")
        count = mtmd_cpp.mtmd_input_chunks_size(chunks)
        found = [mtmd_cpp.mtmd_input_chunks_get(chunks, i) for i in range(count)]
        kind = mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE
        return chunks, [c for c in found if mtmd_cpp.mtmd_input_chunk_get_type(c) == kind]

    def _bitmap(self, picture: bytes) -> int:
        pixels = (ctypes.c_uint8 * len(picture)).from_buffer_copy(picture)
        return mtmd_cpp.mtmd_bitmap_init(self.side, self.side, pixels)

    @staticmethod
    def _place(
        batch: llama_cpp.llama_batch,
        at: int,
        *,
        token: int,
        position: int,
        sequence: int,
        logits: bool,
    ) -> None:
        batch.token[at] = token
        batch.pos[at] = position
        batch.n_seq_id[at] = 1
        batch.seq_id[at][0] = sequence
        batch.logits[at] = int(logits)

    def _decode(self, batch: llama_cpp.llama_batch) -> None:
        error = llama_cpp.llama_decode(self._context, batch)
        if error:
            raise SystemExit(f"llama.cpp could not decode: error {error}")

    def _best(self, at: int) -> int:
        pointer = llama_cpp.llama_get_logits_ith(self._context, at)
        return int(np.ctypeslib.as_array(pointer, shape=(self._vocabulary,)).argmax())


def load(options: Options) -> LlamaCpp:
    """kind: Q4_0, Q4_K_M, Q8_0, F16; `Q4_0-noflash` without flash attention, see contest.py."""
    return LlamaCpp(options)
