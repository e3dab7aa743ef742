// The conversation: messages, what can be done with them, and where the next one is written.

import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { Icon, Markdown } from "./parts";
import { Picker } from "./picker";
import { drawn, PEBBLE_EXAMPLES, type Example } from "./pictures";
import type { Chat } from "./conversation";
import type { Message, Model, Picture, Stats } from "./types";

interface Props {
  chat: Chat;
  model: Model | null;
  active: boolean;
}

export function ChatView({ chat, model, active }: Props) {
  const log = useRef<HTMLDivElement>(null);
  const follows = useRef(true);
  const { messages, id } = chat.conversation;

  useLayoutEffect(() => {
    if (follows.current) log.current!.scrollTop = log.current!.scrollHeight;
  }, [messages]);
  useEffect(() => {
    follows.current = true;
  }, [id]);

  function scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = log.current!;
    follows.current = scrollHeight - scrollTop - clientHeight < 60;
  }

  return (
    <>
      <div class="scroll" ref={log} onScroll={scrolled} tabIndex={0} role="region" aria-label="Conversation">
        {messages.length === 0 && <Empty model={model} onExample={(one) => chat.send(one.question, [drawn(one.marks, one.name)])} />}
        <div class="log" role="log" aria-live="polite" aria-label="Messages" aria-busy={chat.isBusy}>
          {messages.map((one, at) => (
            <One key={one.id} message={one} chat={chat} isLast={at === messages.length - 1} />
          ))}
        </div>
      </div>
      <Composer key={id} chat={chat} model={model} active={active} />
    </>
  );
}

function Empty({ model, onExample }: { model: Model | null; onExample: (example: Example) => void }) {
  const isPebble = model?.id === "pebble";
  return (
    <div class="empty">
      <h2>Ask about a picture</h2>
      <p>
        {isPebble
          ? "pebble is the small model inside lapilli. It knows coloured shapes, short words and numbers: draw some, or begin with one of these."
          : "Drop or paste a picture, choose a file, draw one or take a photo, and ask."}
      </p>
      {isPebble && (
        <ul class="examples">
          {PEBBLE_EXAMPLES.map((one) => (
            <li key={one.name}>
              <button type="button" onClick={() => onExample(one)}>
                <img src={drawn(one.marks, one.name, 160).url} alt={one.name} />
                <span>{one.question}</span>
              </button>
            </li>
          ))}
        </ul>
      )}
    </div>
  );
}

function One({ message, chat, isLast }: { message: Message; chat: Chat; isLast: boolean }) {
  const [isEdited, setEdited] = useState(false);
  const edit = useRef<HTMLButtonElement>(null);
  const isMine = message.role === "user";
  const isRunning = isLast && !isMine && chat.isBusy;

  function done() {
    setEdited(false);
    setTimeout(() => edit.current?.focus());
  }

  return (
    <article class={`message ${message.role}`} aria-label={isMine ? "You" : "Answer"}>
      {message.pictures.length > 0 && (
        <div class="pictures">
          {message.pictures.map((one) => (
            <img key={one.id} src={one.url} alt={one.name} />
          ))}
        </div>
      )}
      {isEdited ? (
        <Editor text={message.text} onCancel={done} onDone={(text) => (done(), chat.edit(message.id, text))} />
      ) : isMine ? (
        message.text && <p class="said">{message.text}</p>
      ) : (
        message.text && <Markdown text={message.text} />
      )}
      {isRunning && !message.text && <p class="waiting">Reading…</p>}
      {message.error && (
        <div class="problem" role="alert">
          <p>{message.error}</p>
          {isLast && (
            <button type="button" onClick={() => chat.regenerate(message.id)}>Try again</button>
          )}
        </div>
      )}
      {message.note && <p class="hint">{message.note}</p>}
      {message.stats && <Facts stats={message.stats} />}
      {!isRunning && !isEdited && (
        <div class="actions">
          {isMine ? (
            <button ref={edit} type="button" class="plain small" disabled={chat.isBusy} onClick={() => setEdited(true)}>Edit</button>
          ) : (
            !message.error && (
              <button type="button" class="plain small" disabled={chat.isBusy} onClick={() => chat.regenerate(message.id)}>Regenerate</button>
            )
          )}
          {message.text && <Copy text={message.text} />}
        </div>
      )}
    </article>
  );
}

function Copy({ text }: { text: string }) {
  const [label, setLabel] = useState("Copy");
  async function copy() {
    const done = await navigator.clipboard?.writeText(text).then(() => true, () => false);
    setLabel(done ? "Copied" : "Not allowed");
    setTimeout(() => setLabel("Copy"), 2000);
  }
  return <button type="button" class="plain small" onClick={copy}>{label}</button>;
}

function Facts({ stats }: { stats: Stats }) {
  const details = [stats.image ? `${stats.image} of pictures` : "", stats.cached ? `${stats.cached} kept` : ""].filter(Boolean);
  const facts = [
    `${stats.prompt} tokens read${details.length ? ` (${details.join(", ")})` : ""}`,
    `${stats.completion} written`,
    `first after ${stats.firstTokenMs < 1000 ? `${Math.round(stats.firstTokenMs)} ms` : `${(stats.firstTokenMs / 1000).toFixed(1)} s`}`,
    ...(stats.perSecond ? [`${stats.perSecond.toFixed(stats.perSecond < 10 ? 1 : 0)} tokens/s`] : []),
  ];
  return <p class="facts">{facts.join(" · ")}</p>;
}

function Editor({ text, onDone, onCancel }: { text: string; onDone: (text: string) => void; onCancel: () => void }) {
  const [value, setValue] = useState(text);
  const area = useRef<HTMLTextAreaElement>(null);
  useEffect(() => area.current!.focus(), []);
  return (
    <form class="editor" onSubmit={(event) => (event.preventDefault(), onDone(value))}>
      <textarea
        ref={area}
        aria-label="Your question"
        rows={3}
        value={value}
        onInput={(event) => setValue(event.currentTarget.value)}
        onKeyDown={(event) => {
          if (event.key === "Escape") onCancel();
          if (isSend(event)) (event.preventDefault(), onDone(value));
        }}
      />
      <div class="row">
        <button type="submit" class="main">Ask again</button>
        <button type="button" onClick={onCancel}>Cancel</button>
      </div>
    </form>
  );
}

function Composer({ chat, model, active }: Props) {
  const [text, setText] = useState("");
  const [pictures, setPictures] = useState<Picture[]>([]);
  const area = useRef<HTMLTextAreaElement>(null);
  const reads = !model || model.modalities.includes("image");
  const isEmpty = !text.trim() && !pictures.length;

  useEffect(() => {
    if (active && matchMedia("(pointer: fine)").matches) area.current!.focus();
  }, [active]);

  function send() {
    if (isEmpty || chat.isBusy) return;
    chat.send(text.trim(), pictures);
    setText("");
    setPictures([]);
    area.current!.focus();
  }

  return (
    <form class="composer" onSubmit={(event) => (event.preventDefault(), send())}>
      <label class="unseen" for="question">Your question</label>
      <textarea
        id="question"
        ref={area}
        rows={2}
        placeholder="Ask something. Shift+Enter begins a new line."
        value={text}
        onInput={(event) => setText(event.currentTarget.value)}
        onKeyDown={(event) => isSend(event) && (event.preventDefault(), send())}
      />
      <div class="row">
        {reads && <Picker pictures={pictures} active={active} onChange={setPictures} />}
        <span class="gap" />
        {chat.isBusy ? (
          <button type="button" class="main" onClick={chat.stop}>
            <Icon name="stop" /> Stop
          </button>
        ) : (
          <button type="submit" class="main" disabled={isEmpty}>
            <Icon name="send" /> Send
          </button>
        )}
      </div>
    </form>
  );
}

function isSend(event: KeyboardEvent): boolean {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}
