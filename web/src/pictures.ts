// Pictures on their way to the server: read, turned upright, scaled down, drawn.

import { newId, type Picture } from "./types";

const MOST_PIXELS = 1344; // of the longer side: four tiles of 336, more than the models read
const MOST_BYTES = 1 << 20; // of a file that is sent as it is

/** Return a file as a picture for the server; the error says what could not be read. */
export async function readPicture(file: File | Blob, name: string): Promise<Picture> {
  let bitmap: ImageBitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new Error(`${name} is no picture that this browser reads (PNG, JPEG, WebP, GIF, AVIF).`);
  }
  const scale = Math.min(1, MOST_PIXELS / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && file.type === "image/png" && file.size <= MOST_BYTES) {
    bitmap.close();
    return { id: newId(), name, url: await dataUrl(file) };
  }
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d")!;
  context.fillStyle = "white"; // what shows through, as JPEG has no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return { id: newId(), name, url: canvas.toDataURL("image/jpeg", 0.92) };
}

function dataUrl(file: Blob): Promise<string> {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result as string);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** Colours with the names that pebble knows them by. */
export const COLOURS: Record<string, string> = {
  red: "#e01010",
  orange: "#f58a0a",
  yellow: "#f7e81e",
  green: "#1fa83a",
  blue: "#1f4fe0",
  purple: "#8a22b8",
  black: "#111111",
  white: "#ffffff",
};

export const SHAPES = ["circle", "square", "triangle", "star", "cross", "ring"];

/** One thing on a drawing: a shape by its middle and size, or a line; in shares of the side. */
export type Mark =
  | { kind: "shape"; shape: string; colour: string; x: number; y: number; size: number }
  | { kind: "line"; colour: string; width: number; points: [number, number][] };

export function drawMarks(canvas: HTMLCanvasElement, marks: Mark[]): void {
  const context = canvas.getContext("2d")!;
  const side = canvas.width;
  context.fillStyle = "white";
  context.fillRect(0, 0, side, side);
  for (const mark of marks) {
    context.fillStyle = context.strokeStyle = COLOURS[mark.colour];
    if (mark.kind === "shape") {
      context.beginPath();
      trace(context, mark.shape, mark.x * side, mark.y * side, (mark.size * side) / 2);
      context.fill("evenodd");
      continue;
    }
    context.lineWidth = mark.width * side;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    mark.points.forEach(([x, y], at) => (at ? context.lineTo(x * side, y * side) : context.moveTo(x * side, y * side)));
    if (mark.points.length === 1) context.lineTo(mark.points[0][0] * side, mark.points[0][1] * side);
    context.stroke();
  }
}

function trace(context: CanvasRenderingContext2D, shape: string, x: number, y: number, r: number): void {
  const corners = (list: [number, number][]) => {
    list.forEach(([dx, dy], at) => (at ? context.lineTo(x + r * dx, y + r * dy) : context.moveTo(x + r * dx, y + r * dy)));
    context.closePath();
  };
  const around = (count: number, radius: (at: number) => number): [number, number][] =>
    Array.from({ length: count }, (_, at) => {
      const angle = (2 * Math.PI * at) / count - Math.PI / 2;
      return [radius(at) * Math.cos(angle), radius(at) * Math.sin(angle)];
    });
  if (shape === "circle" || shape === "ring") {
    context.arc(x, y, r, 0, 2 * Math.PI);
    if (shape === "ring") context.arc(x, y, r * 0.55, 0, 2 * Math.PI);
  } else if (shape === "square") {
    context.rect(x - r * 0.85, y - r * 0.85, r * 1.7, r * 1.7);
  } else if (shape === "triangle") {
    corners(around(3, () => 1));
  } else if (shape === "star") {
    corners(around(10, (at) => (at % 2 ? 0.42 : 1)));
  } else {
    const w = 0.32; // half the width of an arm
    corners([[-w, -1], [w, -1], [w, -w], [1, -w], [1, w], [w, w], [w, 1], [-w, 1], [-w, w], [-1, w], [-1, -w], [-w, -w]]);
  }
}

/** Return a drawing as a picture. */
export function drawn(marks: Mark[], name: string, side = 480): Picture {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  drawMarks(canvas, marks);
  return { id: newId(), name, url: canvas.toDataURL("image/png") };
}

export interface Example {
  name: string;
  question: string;
  marks: Mark[];
}

function shape(colour: string, shape: string, x: number, y: number, size: number): Mark {
  return { kind: "shape", shape, colour, x, y, size };
}

/** What pebble, the embedded model, can be asked: its world is coloured shapes. */
export const PEBBLE_EXAMPLES: Example[] = [
  { name: "a red circle", question: "What color is the circle?", marks: [shape("red", "circle", 0.5, 0.5, 0.33)] },
  {
    name: "a blue square and a green star",
    question: "What is to the left of the green star?",
    marks: [shape("blue", "square", 0.25, 0.5, 0.26), shape("green", "star", 0.75, 0.5, 0.3)],
  },
  {
    name: "four objects",
    question: "How many objects are there?",
    marks: [
      shape("red", "triangle", 0.2, 0.22, 0.26),
      shape("purple", "ring", 0.78, 0.2, 0.24),
      shape("orange", "circle", 0.22, 0.78, 0.24),
      shape("blue", "cross", 0.78, 0.78, 0.26),
    ],
  },
];

export const PEBBLE_QUESTIONS = [
  ...["red", "orange", "yellow", "green", "blue", "purple", "black"].map((one) => `Is there ${article(one)} object?`),
  ...SHAPES.map((one) => `Is there a ${one}?`),
  "Is there a red circle?",
  "Is there a blue square?",
  "Is there a green star?",
  "Is there a red square?",
  "Is there a blue circle?",
  "Is the circle red?",
  "Is there anything in the centre?",
];

export const QUESTIONS = [
  "Is there a person in the picture?",
  "Is there an animal in the picture?",
  "Is there text in the picture?",
  "Was the picture taken outdoors?",
  "Is it day?",
  "Is there a vehicle in the picture?",
  "Is there food in the picture?",
  "Is there water in the picture?",
  "Is there a building in the picture?",
  "Is the picture a drawing?",
];

function article(colour: string): string {
  return `${colour === "orange" ? "an" : "a"} ${colour}`;
}
