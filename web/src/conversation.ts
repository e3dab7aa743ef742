// One conversation under way: what is said, what is being answered, what is stored.

import { useEffect, useRef, useState } from "preact/hooks";
import { chat, LostError, ServerError } from "./api";
import * as store from "./store";
import { newId, type Conversation, type Message, type Parameters, type Picture } from "./types";

export interface Chat {
  conversation: Conversation;
  history: Conversation[];
  isBusy: boolean;
  isKept: boolean; // false: the browser has no room for it
  send: (text: string, pictures: Picture[]) => void;
  edit: (id: string, text: string) => void;
  regenerate: (id: string) => void;
  stop: () => void;
  open: (conversation: Conversation) => void;
  remove: (id: string) => void;
}

/** Return whether a tab is about to write the last answer. */
function isUnfinished(conversation: Conversation): boolean {
  const last = conversation.messages.at(-1);
  return last?.role === "assistant" && !last.text && !last.note && !last.error;
}

/**
 * Return the conversation of this tab.
 *
 * Args: the model's name, options of answers, and what is told of a server that refuses or is gone.
 */
export function useChat(model: string, parameters: Parameters, onError: (error: unknown) => void): Chat {
  const [conversation, show] = useState(store.current);
  const [history, setHistory] = useState(store.list);
  const [isBusy, setBusy] = useState(false);
  const [isKept, setKept] = useState(true);
  const now = useRef(conversation); // what is shown, or is about to be
  const running = useRef<AbortController | null>(null);

  function put(next: Conversation): void {
    now.current = next;
    show(next);
  }

  function keep(): void {
    const stored = store.save(now.current);
    setKept(stored !== null);
    if (stored) put(stored);
    store.setCurrent(now.current.id);
    setHistory(store.list());
  }

  function update(id: string, change: Partial<Message>): boolean {
    const { messages } = now.current;
    if (!messages.some((one) => one.id === id)) return false; // another conversation has been opened
    put({ ...now.current, messages: messages.map((one) => (one.id === id ? { ...one, ...change } : one)) });
    return true;
  }

  async function answer(messages: Message[]): Promise<void> {
    const reply: Message = { id: newId(), role: "assistant", text: "", pictures: [] };
    const control = new AbortController();
    running.current = control;
    setBusy(true);
    put({ ...now.current, messages: [...messages, reply] });
    keep();
    let text = "";
    let frame = 0;
    const shown = () => {
      frame = 0;
      update(reply.id, { text });
    };
    const change: Partial<Message> = {};
    try {
      for await (const piece of chat(model, messages, parameters, control.signal)) {
        if ("text" in piece) {
          text += piece.text;
          frame ||= requestAnimationFrame(shown);
        } else if ("stats" in piece) change.stats = piece.stats;
        else if (piece.finish === "length") change.note = "The answer has reached the longest length.";
      }
      if (!text.trim()) change.note ??= "The answer is empty.";
    } catch (error) {
      if (control.signal.aborted) change.note = "Stopped.";
      else {
        change.error = (error as Error).message;
        if (error instanceof LostError || error instanceof ServerError) onError(error);
      }
    }
    cancelAnimationFrame(frame);
    if (running.current === control) {
      running.current = null;
      setBusy(false);
    }
    if (update(reply.id, { text: text.trim(), ...change })) keep();
  }

  function stop(): void {
    running.current?.abort();
  }

  function leave(): void {
    if (!running.current) return;
    running.current.abort();
    running.current = null;
    setBusy(false);
    const last = now.current.messages.at(-1)!;
    update(last.id, { note: "Stopped." });
    keep();
  }

  useEffect(() => {
    const changed = (event: StorageEvent) => {
      if (!store.isConversation(event.key)) return;
      setHistory(store.list());
      const stored = store.load(now.current.id);
      if (stored && !running.current && !isUnfinished(stored)) put(stored); // another tab has gone on with it
    };
    addEventListener("storage", changed);
    addEventListener("pagehide", leave);
    return () => {
      removeEventListener("storage", changed);
      removeEventListener("pagehide", leave);
    };
  }, []);

  return {
    conversation,
    history,
    isBusy,
    isKept,
    stop,
    send: (text, pictures) => {
      if (running.current) return;
      void answer([...now.current.messages, { id: newId(), role: "user", text, pictures }]);
    },
    edit: (id, text) => {
      const { messages } = now.current;
      const at = messages.findIndex((one) => one.id === id);
      if (running.current || at < 0) return;
      void answer([...messages.slice(0, at), { ...messages[at], id: newId(), text }]);
    },
    regenerate: (id) => {
      const { messages } = now.current;
      const at = messages.findIndex((one) => one.id === id);
      if (running.current || at < 0) return;
      void answer(messages.slice(0, at));
    },
    open: (next) => {
      leave();
      setKept(true);
      put(next);
      store.setCurrent(next.id);
    },
    remove: (id) => {
      store.remove(id);
      setHistory(store.list());
      if (now.current.id !== id) return;
      running.current?.abort();
      running.current = null;
      setBusy(false);
      put(store.fresh());
      store.setCurrent(now.current.id);
    },
  };
}
