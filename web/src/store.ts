// Conversations in localStorage, one entry each, so that tabs which write at the same time do not meet.

import { newId, type Conversation, type Parameters } from "./types";

const PREFIX = "lapilli:conversation:";
const CURRENT = "lapilli:current"; // in sessionStorage: a reload goes on, a new tab begins anew
const MOST = 100;

export const NO_PARAMETERS: Parameters = { system: "", temperature: "", top_p: "", top_k: "", max_tokens: "", seed: "" };

export function fresh(): Conversation {
  return { id: newId(), revision: "", updated: Date.now(), messages: [] };
}

export function load(id: string): Conversation | null {
  try {
    const found = JSON.parse(localStorage.getItem(PREFIX + id) ?? "null");
    return found && Array.isArray(found.messages) ? found : null;
  } catch {
    return null;
  }
}

/** Return all conversations, the newest first. */
export function list(): Conversation[] {
  const ids = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  const found = ids.map((key) => load(key.slice(PREFIX.length))).filter((one) => one !== null);
  return found.sort((a, b) => b.updated - a.updated);
}

/**
 * Store a conversation and return it as it is stored, or null if the browser has no room for it.
 *
 * Where another tab has gone on with the same conversation, this one becomes a conversation of its own.
 */
export function save(conversation: Conversation): Conversation | null {
  const stored = load(conversation.id);
  const id = stored && stored.revision !== conversation.revision ? newId() : conversation.id;
  const next = { ...conversation, id, revision: newId(), updated: Date.now() };
  const old = list().filter((one) => one.id !== id);
  for (const one of old.splice(MOST - 1)) remove(one.id);
  while (true) {
    try {
      localStorage.setItem(PREFIX + id, JSON.stringify(next));
      return next;
    } catch {
      const oldest = old.pop();
      if (!oldest) return null;
      remove(oldest.id);
    }
  }
}

export function remove(id: string): void {
  localStorage.removeItem(PREFIX + id);
}

export function isConversation(key: string | null): boolean {
  return key === null || key.startsWith(PREFIX);
}

export function current(): Conversation {
  return load(sessionStorage.getItem(CURRENT) ?? "") ?? fresh();
}

export function setCurrent(id: string): void {
  sessionStorage.setItem(CURRENT, id);
}

export function readSetting<T>(name: string, otherwise: T): T {
  try {
    return JSON.parse(localStorage.getItem(`lapilli:${name}`) ?? "null") ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function writeSetting(name: string, value: unknown): void {
  try {
    localStorage.setItem(`lapilli:${name}`, JSON.stringify(value));
  } catch {
    // No room: the setting counts until the page is closed.
  }
}

export function titleOf(conversation: Conversation): string {
  const first = conversation.messages[0];
  return first?.text.trim().slice(0, 60) || (first ? "A picture" : "New conversation");
}
