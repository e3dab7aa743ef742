// A drawing: shapes and lines in colours that have names, with a mouse, a finger or the keyboard.

import { useEffect, useRef, useState } from "preact/hooks";
import { Dialog } from "./parts";
import { COLOURS, drawMarks, drawn, SHAPES, type Mark } from "./pictures";
import type { Picture } from "./types";

const SIDE = 480;
const SIZE = 0.33; // of a shape that is placed without dragging
const STEP = 1 / 20; // of an arrow key

export function Drawing({ onClose, onDone }: { onClose: () => void; onDone: (picture: Picture) => void }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [tool, setTool] = useState("brush");
  const [colour, setColour] = useState("red");
  const [width, setWidth] = useState(0.03);
  const [marks, setMarks] = useState<Mark[]>([]);
  const [cursor, setCursor] = useState<[number, number] | null>(null); // of the keyboard
  const [said, setSaid] = useState("");
  const drawing = useRef<Mark | null>(null);

  useEffect(() => {
    drawMarks(canvas.current!, marks);
    if (cursor) drawCursor(canvas.current!, cursor);
  }, [marks, cursor]);

  function at(event: PointerEvent): [number, number] {
    const box = canvas.current!.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }

  function begin(x: number, y: number): Mark {
    const mark: Mark =
      tool === "brush"
        ? { kind: "line", colour, width, points: [[x, y]] }
        : { kind: "shape", shape: tool, colour, x, y, size: SIZE };
    setMarks((before) => [...before, mark]);
    setSaid(tool === "brush" ? `A ${colour} line.` : `A ${colour} ${tool}.`);
    return mark;
  }

  function down(event: PointerEvent) {
    canvas.current!.setPointerCapture(event.pointerId);
    setCursor(null);
    drawing.current = begin(...at(event));
  }

  function move(event: PointerEvent) {
    const before = drawing.current;
    if (!before) return;
    const [x, y] = at(event);
    let next: Mark;
    if (before.kind === "line") {
      next = { ...before, points: [...before.points, [x, y]] };
    } else {
      const reach = Math.hypot(x - before.x, y - before.y);
      if (reach < 0.04) return; // a click that trembles
      next = { ...before, size: 2 * reach };
    }
    drawing.current = next;
    setMarks((all) => [...all.slice(0, -1), next]);
  }

  function key(event: KeyboardEvent) {
    const [x, y] = cursor ?? [0.5, 0.5];
    const steps: Record<string, [number, number]> = {
      ArrowLeft: [-STEP, 0],
      ArrowRight: [STEP, 0],
      ArrowUp: [0, -STEP],
      ArrowDown: [0, STEP],
    };
    const step = steps[event.key];
    if (step) setCursor([clamp(x + step[0]), clamp(y + step[1])]);
    else if (event.key === "Enter" || event.key === " ") begin(x, y);
    else return;
    event.preventDefault();
  }

  return (
    <Dialog title="Draw a picture" class="drawing" onClose={onClose}>
      <div class="tools">
        <Choice name="tool" label="Tool" values={["brush", ...SHAPES]} value={tool} onChange={setTool} />
        <Choice name="colour" label="Colour" values={Object.keys(COLOURS)} value={colour} onChange={setColour} swatches />
        {tool === "brush" && (
          <label class="slider">
            Width
            <input type="range" min="0.01" max="0.12" step="0.01" value={width} onInput={(e) => setWidth(Number(e.currentTarget.value))} />
          </label>
        )}
      </div>
      <canvas
        ref={canvas}
        width={SIDE}
        height={SIDE}
        tabIndex={0}
        role="application"
        aria-label="Drawing area"
        aria-describedby="drawing-help"
        onPointerDown={down}
        onPointerMove={move}
        onPointerUp={() => (drawing.current = null)}
        onPointerCancel={() => (drawing.current = null)}
        onKeyDown={key}
        onFocus={(event) => event.currentTarget.matches(":focus-visible") && setCursor([0.5, 0.5])}
        onBlur={() => setCursor(null)}
      />
      <p id="drawing-help" class="hint">
        Click for a shape, drag for its size. With the keyboard: arrow keys move, Enter places.
      </p>
      <p class="unseen" role="status">{said}</p>
      <footer>
        <button type="button" disabled={!marks.length} onClick={() => setMarks((before) => before.slice(0, -1))}>Undo</button>
        <button type="button" disabled={!marks.length} onClick={() => setMarks([])}>Clear</button>
        <span class="gap" />
        <button type="button" onClick={onClose}>Cancel</button>
        <button type="button" class="main" disabled={!marks.length} onClick={() => onDone(drawn(marks, nameOf(marks), SIDE))}>
          Use the drawing
        </button>
      </footer>
    </Dialog>
  );
}

interface ChoiceProps {
  name: string;
  label: string;
  values: string[];
  value: string;
  swatches?: boolean;
  onChange: (value: string) => void;
}

function Choice({ name, label, values, value, swatches, onChange }: ChoiceProps) {
  return (
    <fieldset class="choice">
      <legend>{label}</legend>
      {values.map((one) => (
        <label key={one} class={one === value ? "chosen" : ""}>
          <input type="radio" name={name} value={one} checked={one === value} onChange={() => onChange(one)} />
          {swatches && (
            <svg class="swatch" viewBox="0 0 10 10" aria-hidden="true">
              <rect width="10" height="10" rx="2" fill={COLOURS[one]} />
            </svg>
          )}
          {one}
        </label>
      ))}
    </fieldset>
  );
}

function drawCursor(canvas: HTMLCanvasElement, [x, y]: [number, number]): void {
  const context = canvas.getContext("2d")!;
  const side = canvas.width;
  context.lineCap = "butt";
  for (const [width, colour] of [[4, "white"], [2, "#555"]] as const) {
    context.lineWidth = width;
    context.strokeStyle = colour;
    context.beginPath();
    context.moveTo(x * side - 12, y * side);
    context.lineTo(x * side + 12, y * side);
    context.moveTo(x * side, y * side - 12);
    context.lineTo(x * side, y * side + 12);
    context.stroke();
  }
}

function clamp(value: number): number {
  return Math.min(1, Math.max(0, value));
}

function nameOf(marks: Mark[]): string {
  const shapes = marks.filter((one) => one.kind === "shape").map((one) => `${one.colour} ${one.shape}`);
  return shapes.length ? `drawing: ${shapes.slice(0, 4).join(", ")}` : "drawing";
}
