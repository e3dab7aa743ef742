// The server: what is asked of it and what it may answer.
//
//   LostError    nothing answers, or the answer ended in its middle
//   ServerError  the server refused, with its cause

import type { Message, Model, Parameters, Stats } from "./types";

const KEY = "lapilli:key"; // in sessionStorage: this tab alone, until it is closed

export class LostError extends Error {}

export class ServerError extends Error {
  constructor(
    message: string,
    readonly status: number,
  ) {
    super(message);
  }
}

export function setKey(key: string): void {
  sessionStorage.setItem(KEY, key);
}

async function request(path: string, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response: Response;
  try {
    response = await fetch(path, { ...init, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    throw lost(error, "The server does not answer. Is it still running?");
  }
  if (!response.ok) throw new ServerError(await cause(response), response.status);
  return response;
}

function lost(error: unknown, message: string): unknown {
  return error instanceof DOMException && error.name === "AbortError" ? error : new LostError(message);
}

async function cause(response: Response): Promise<string> {
  const text = await response.text().catch(() => "");
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text.slice(0, 300) || `The server answered with status ${response.status}.`;
  }
}

function post(path: string, body: unknown, signal?: AbortSignal): Promise<Response> {
  const headers = { "Content-Type": "application/json" };
  return request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

export async function fetchModel(): Promise<Model> {
  return (await (await request("/v1/models")).json()).data[0];
}

/** Return whether the server answers lists of yes/no questions. */
export async function hasDecisions(): Promise<boolean> {
  return "/v1/decisions" in (await (await request("/openapi.json")).json()).paths;
}

export type Piece = { text: string } | { finish: string } | { stats: Stats };

/** Yield an answer as it comes. */
export async function* chat(
  model: string,
  messages: Message[],
  parameters: Parameters,
  signal: AbortSignal,
): AsyncGenerator<Piece> {
  const said = messages.map((one) => ({ role: one.role, content: one.role === "user" ? parts(one) : one.text }));
  const system = parameters.system.trim() ? [{ role: "system", content: parameters.system }] : [];
  const { system: _, ...numbers } = parameters;
  const options = Object.entries(numbers).filter(([, value]) => value.trim() !== "");
  const body = {
    model,
    messages: [...system, ...said],
    stream: true,
    stream_options: { include_usage: true },
    ...Object.fromEntries(options.map(([name, value]) => [name, Number(value)])),
  };
  const response = await post("/v1/chat/completions", body, signal);
  for await (const data of events(response)) {
    if (data.error) throw new ServerError(data.error.message, 500);
    const choice = data.choices[0];
    if (choice?.delta.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (data.usage) yield { stats: stats(data.usage, data.timings) };
  }
}

function parts(message: Message): unknown {
  if (!message.pictures.length) return message.text;
  const pictures = message.pictures.map((one) => ({ type: "image_url", image_url: { url: one.url } }));
  return message.text ? [...pictures, { type: "text", text: message.text }] : pictures;
}

/** Yield the data of server-sent events up to [DONE]. */
async function* events(response: Response): AsyncGenerator<any> {
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  const broken = "The connection to the server was lost in the middle of the answer.";
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) throw new LostError(broken);
      const lines = (rest + value).split("\n");
      rest = lines.pop()!;
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } catch (error) {
    throw error instanceof TypeError ? new LostError(broken) : error; // fetch's error of a broken stream
  } finally {
    reader.cancel().catch(() => {});
  }
}

function stats(usage: any, timings: any): Stats {
  return {
    prompt: usage.prompt_tokens,
    completion: usage.completion_tokens,
    image: usage.prompt_tokens_details?.image_tokens ?? 0,
    cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
    firstTokenMs: timings?.first_token_ms ?? 0,
    totalMs: timings?.total_ms ?? 0,
    perSecond: timings?.predicted_per_second ?? 0,
  };
}

export interface Decision {
  answers: { type: string; name?: string; probability?: number }[];
  usage: { input_tokens: number };
}

/** Ask several yes/no questions about the same pictures and text. */
export async function decide(model: string, pictures: string[], text: string, questions: string[]): Promise<Decision> {
  const content = [
    ...pictures.map((url) => ({ type: "input_image", image_url: url })),
    ...(text.trim() ? [{ type: "input_text", text }] : []),
  ];
  const body = {
    model,
    input: [{ role: "user", content }],
    questions: questions.map((one) => ({ type: "predicate", instructions: one })),
  };
  return (await post("/v1/decisions", body)).json();
}
