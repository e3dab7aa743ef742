// What the page keeps: conversations, their messages, pictures; and what the server tells of its model.

export interface Picture {
  id: string;
  name: string;
  url: string; // a data: URL
}

export interface Stats {
  prompt: number;
  image: number;
  cached: number;
  completion: number;
  firstTokenMs: number;
  totalMs: number;
  perSecond: number;
}

export interface Message {
  id: string;
  role: "user" | "assistant";
  text: string;
  pictures: Picture[];
  stats?: Stats;
  error?: string; // why there is no answer, or only a part of one
  note?: string; // "stopped", or that the longest answer was reached
}

export interface Conversation {
  id: string;
  revision: string; // of what is stored: another one there means that another tab has written
  updated: number;
  messages: Message[];
}

export interface Model {
  id: string;
  max_model_len: number;
  modalities: string[];
  architecture: { language_model: string; layers: number; hidden_size: number; parameters: number };
}

/** Options of an answer as they are typed; what is empty is left to the server. */
export interface Parameters {
  system: string;
  temperature: string;
  top_p: string;
  top_k: string;
  max_tokens: string;
  seed: string;
}

export function newId(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (one) => one.toString(16).padStart(2, "0")).join("");
}
