// Many yes/no questions about the same pictures, answered at once with probabilities.

import { useEffect, useRef, useState } from "preact/hooks";
import { decide } from "./api";
import { Picker } from "./picker";
import { PEBBLE_QUESTIONS, QUESTIONS } from "./pictures";
import type { Model, Picture } from "./types";

interface Row {
  question: string;
  probability: number | null; // null: the model declined
}

interface Props {
  model: Model | null;
  active: boolean;
  onError: (error: unknown) => void;
}

export function Decisions({ model, active, onError }: Props) {
  const [pictures, setPictures] = useState<Picture[]>([]);
  const [text, setText] = useState("");
  const [questions, setQuestions] = useState("");
  const [rows, setRows] = useState<Row[]>([]);
  const [said, setSaid] = useState("");
  const [problem, setProblem] = useState("");
  const [isBusy, setBusy] = useState(false);
  const [isSorted, setSorted] = useState(false);
  const filled = useRef(false);

  useEffect(() => {
    if (!model || filled.current) return;
    filled.current = true;
    setQuestions((model.id === "pebble" ? PEBBLE_QUESTIONS : QUESTIONS).join("\n"));
  }, [model]);

  const asked = questions.split("\n").map((one) => one.trim()).filter(Boolean);

  async function ask(event: Event) {
    event.preventDefault();
    setBusy(true);
    setProblem("");
    try {
      const began = performance.now();
      const found = await decide(model?.id ?? "", pictures.map((one) => one.url), text, asked);
      const seconds = ((performance.now() - began) / 1000).toFixed(2);
      setRows(found.answers.map((one, at) => ({ question: asked[at], probability: one.probability ?? null })));
      setSaid(`${found.answers.length} answers in ${seconds} s, ${found.usage.input_tokens} tokens read.`);
    } catch (error) {
      setProblem((error as Error).message);
      onError(error);
    } finally {
      setBusy(false);
    }
  }

  const shown = isSorted ? [...rows].sort((a, b) => (b.probability ?? -1) - (a.probability ?? -1)) : rows;

  return (
    <div class="decisions">
      <form onSubmit={ask}>
        <h2>Many questions at once</h2>
        <p class="hint">The pictures are read once. Every question is answered by the probability of yes.</p>
        <Picker pictures={pictures} active={active} onChange={setPictures} />
        <label for="context">Text beside the pictures, if any</label>
        <textarea id="context" rows={2} value={text} onInput={(event) => setText(event.currentTarget.value)} />
        <label for="questions">Questions, one a line</label>
        <textarea id="questions" rows={12} value={questions} onInput={(event) => setQuestions(event.currentTarget.value)} />
        <button type="submit" class="main" disabled={isBusy || !asked.length}>
          {isBusy ? "Asking…" : asked.length === 1 ? "Ask 1 question" : `Ask ${asked.length} questions`}
        </button>
        {problem && <p class="problem" role="alert">{problem}</p>}
      </form>
      <section aria-label="Answers">
        <p role="status" class="hint">{said}</p>
        {rows.length > 0 && (
          <>
            <label class="check">
              <input type="checkbox" checked={isSorted} onChange={(event) => setSorted(event.currentTarget.checked)} /> Most likely first
            </label>
            <table>
              <thead>
                <tr>
                  <th scope="col">Question</th>
                  <th scope="col">Probability of yes</th>
                </tr>
              </thead>
              <tbody>
                {shown.map((one, at) => (
                  <tr key={at}>
                    <th scope="row">{one.question}</th>
                    <td>
                      {one.probability === null ? "declined" : <Bar value={one.probability} label={one.question} />}
                    </td>
                  </tr>
                ))}
              </tbody>
            </table>
          </>
        )}
      </section>
    </div>
  );
}

function Bar({ value, label }: { value: number; label: string }) {
  return (
    <span class="bar">
      <progress max={1} value={value} aria-label={label} />
      <span>{(100 * value).toFixed(1)} %</span>
    </span>
  );
}
