// Facts of the model and options of answers; the key, where the server asks for one.

import { useState } from "preact/hooks";
import { setKey } from "./api";
import { Dialog } from "./parts";
import { NO_PARAMETERS } from "./store";
import type { Model, Parameters } from "./types";

const NUMBERS: [keyof Parameters, string, string, string, string][] = [
  // name, label, least, most, step
  ["temperature", "Temperature", "0", "5", "0.1"],
  ["top_p", "Top p", "0.01", "1", "0.01"],
  ["top_k", "Top k", "0", "", "1"],
  ["max_tokens", "Most tokens", "1", "", "1"],
  ["seed", "Seed", "0", "", "1"],
];

interface Props {
  model: Model | null;
  parameters: Parameters;
  onChange: (parameters: Parameters) => void;
  onClose: () => void;
}

export function Settings({ model, parameters, onChange, onClose }: Props) {
  return (
    <Dialog title="Model and parameters" onClose={onClose}>
      {model && (
        <dl class="model">
          <dt>Model</dt>
          <dd>{model.id}</dd>
          <dt>Language model</dt>
          <dd>
            {model.architecture.language_model}, {model.architecture.layers} layers of width {model.architecture.hidden_size}
          </dd>
          <dt>Parameters</dt>
          <dd>{count(model.architecture.parameters)}</dd>
          <dt>Context</dt>
          <dd>{model.max_model_len} tokens</dd>
          <dt>Reads</dt>
          <dd>{model.modalities.join(", ")}</dd>
        </dl>
      )}
      <p class="hint">What is left empty is the server's to choose.</p>
      <label for="system">Instructions before the conversation (system prompt)</label>
      <textarea id="system" rows={3} value={parameters.system} onInput={(event) => onChange({ ...parameters, system: event.currentTarget.value })} />
      <div class="numbers">
        {NUMBERS.map(([name, label, min, max, step]) => (
          <label key={name}>
            {label}
            <input
              type="number"
              inputMode="decimal"
              min={min}
              max={max}
              step={step}
              placeholder="default"
              value={parameters[name]}
              onInput={(event) => onChange({ ...parameters, [name]: event.currentTarget.value })}
            />
          </label>
        ))}
      </div>
      <footer>
        <button type="button" onClick={() => onChange(NO_PARAMETERS)}>Defaults</button>
        <span class="gap" />
        <button type="button" class="main" onClick={onClose}>Done</button>
      </footer>
    </Dialog>
  );
}

export function count(number: number): string {
  if (number >= 1e9) return `${(number / 1e9).toFixed(1)} billion`;
  return number >= 1e6 ? `${(number / 1e6).toFixed(1)} million` : String(number);
}

export function KeyDialog({ onClose, onDone }: { onClose: () => void; onDone: () => void }) {
  const [key, set] = useState("");
  function done(event: Event) {
    event.preventDefault();
    setKey(key.trim());
    onDone();
  }
  return (
    <Dialog title="This server asks for a key" onClose={onClose}>
      <form onSubmit={done}>
        <label for="key">API key</label>
        <input id="key" type="password" autocomplete="off" value={key} onInput={(event) => set(event.currentTarget.value)} />
        <p class="hint">It is kept in this tab until the tab is closed.</p>
        <footer>
          <button type="button" onClick={onClose}>Cancel</button>
          <button type="submit" class="main" disabled={!key.trim()}>Use it</button>
        </footer>
      </form>
    </Dialog>
  );
}
