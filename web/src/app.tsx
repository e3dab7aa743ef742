// The page: a bar, the history, and the tabs.

import type { ComponentChildren } from "preact";
import { useEffect, useState } from "preact/hooks";
import { fetchModel, hasDecisions, LostError, ServerError } from "./api";
import { ChatView } from "./chat";
import { useChat, type Chat } from "./conversation";
import { Decisions } from "./decisions";
import { exportConversation } from "./export";
import { Icon } from "./parts";
import { KeyDialog, Settings } from "./settings";
import { fresh, NO_PARAMETERS, readSetting, titleOf, writeSetting } from "./store";
import type { Model } from "./types";

const RETRY_MS = 3000;
const THEMES = ["auto", "light", "dark"] as const;
type Tab = "chat" | "decisions";

export function App() {
  const server = useServer();
  const [parameters, setParameters] = useState(() => ({ ...NO_PARAMETERS, ...readSetting("parameters", {}) }));
  const chat = useChat(server.model?.id ?? "", parameters, server.failed);
  const [tab, setTab] = useState<Tab>("chat");
  const [open, setOpen] = useState<"" | "settings" | "history">("");
  const shown: Tab = server.decides ? tab : "chat";

  useEffect(() => writeSetting("parameters", parameters), [parameters]);
  useEffect(() => {
    document.title = chat.conversation.messages.length ? `${titleOf(chat.conversation)} - lapilli` : "lapilli";
  }, [chat.conversation]);

  return (
    <div class={`page ${open === "history" ? "with-history" : ""}`}>
      <header class="bar">
        <button
          type="button"
          class="plain menu"
          aria-label="Conversations"
          aria-expanded={open === "history"}
          aria-controls="history"
          onClick={() => setOpen(open === "history" ? "" : "history")}
        >
          <Icon name="list" />
        </button>
        <h1>lapilli</h1>
        {server.decides && <Tabs tab={shown} onChange={setTab} />}
        <span class="gap" />
        <button type="button" class="plain" aria-label={`Model and parameters: ${server.model?.id ?? "not known yet"}`} onClick={() => setOpen("settings")}>
          <Icon name="tune" /> <span class="name">{server.model?.id ?? "…"}</span>
        </button>
        <Theme />
      </header>
      <History chat={chat} onChosen={() => (setOpen(""), setTab("chat"))} />
      <main onFocusCapture={() => setOpen((before) => (before === "history" ? "" : before))}>
        <div class="notices" role="status">
          {server.isLost && <p class="notice">No connection to the server. Trying again…</p>}
          {!chat.isKept && <p class="notice">This conversation is too large for the browser to keep: export it before you leave.</p>}
        </div>
        <Panel tab="chat" shown={shown} tabs={server.decides}>
          <ChatView chat={chat} model={server.model} active={shown === "chat"} />
        </Panel>
        {server.decides && (
          <Panel tab="decisions" shown={shown} tabs>
            <Decisions model={server.model} active={shown === "decisions"} onError={server.failed} />
          </Panel>
        )}
      </main>
      {open === "settings" && (
        <Settings model={server.model} parameters={parameters} onChange={setParameters} onClose={() => setOpen("")} />
      )}
      {server.asksKey && <KeyDialog onClose={() => server.setAsksKey(false)} onDone={server.load} />}
    </div>
  );
}

/** Return what is known of the server, which is asked again while it is not there. */
function useServer() {
  const [model, setModel] = useState<Model | null>(null);
  const [decides, setDecides] = useState(false);
  const [isLost, setLost] = useState(false);
  const [asksKey, setAsksKey] = useState(false);

  function failed(error: unknown): void {
    if (error instanceof LostError) setLost(true);
    if (error instanceof ServerError && error.status === 401) setAsksKey(true);
  }

  async function load(): Promise<void> {
    setAsksKey(false);
    try {
      setModel(await fetchModel());
      setDecides(await hasDecisions());
      setLost(false);
    } catch (error) {
      failed(error);
    }
  }

  useEffect(() => void load(), []);
  useEffect(() => {
    if (!isLost) return;
    const timer = setInterval(load, RETRY_MS);
    return () => clearInterval(timer);
  }, [isLost]);

  return { model, decides, isLost, asksKey, setAsksKey, failed, load };
}

function Tabs({ tab, onChange }: { tab: Tab; onChange: (tab: Tab) => void }) {
  const names: [Tab, string][] = [["chat", "Chat"], ["decisions", "Decisions"]];
  function key(event: KeyboardEvent) {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tab === "chat" ? "decisions" : "chat";
    onChange(other);
    document.getElementById(`tab-${other}`)?.focus();
  }
  return (
    <div class="tabs" role="tablist" aria-label="Views" onKeyDown={key}>
      {names.map(([name, label]) => (
        <button
          key={name}
          type="button"
          role="tab"
          id={`tab-${name}`}
          aria-selected={tab === name}
          aria-controls={`panel-${name}`}
          tabIndex={tab === name ? 0 : -1}
          onClick={() => onChange(name)}
        >
          {label}
        </button>
      ))}
    </div>
  );
}

function Panel(props: { tab: Tab; shown: Tab; tabs: boolean; children: ComponentChildren }) {
  const role = props.tabs ? { role: "tabpanel" as const, "aria-labelledby": `tab-${props.tab}` } : {};
  return (
    <div id={`panel-${props.tab}`} class="panel" hidden={props.tab !== props.shown} {...role}>
      {props.children}
    </div>
  );
}

function Theme() {
  const [theme, setTheme] = useState<(typeof THEMES)[number]>(() => readSetting("theme", "auto"));
  useEffect(() => {
    document.documentElement.dataset.theme = theme;
    writeSetting("theme", theme);
  }, [theme]);
  const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  return (
    <button type="button" class="plain" aria-label={`Colours: ${theme}. Change to ${next}`} title={`Colours: ${theme}`} onClick={() => setTheme(next)}>
      <Icon name={theme} />
    </button>
  );
}

function History({ chat, onChosen }: { chat: Chat; onChosen: () => void }) {
  const { conversation, history } = chat;
  return (
    <nav id="history" aria-label="Conversations">
      <button type="button" class="new" onClick={() => (chat.open(fresh()), onChosen())}>
        <Icon name="plus" /> New conversation
      </button>
      <ul>
        {history.map((one) => (
          <li key={one.id} class={one.id === conversation.id ? "current" : ""}>
            <button
              type="button"
              class="plain"
              aria-current={one.id === conversation.id ? "true" : undefined}
              onClick={() => (chat.open(one), onChosen())}
            >
              {titleOf(one)}
            </button>
            <button
              type="button"
              class="plain delete"
              aria-label={`Delete ${titleOf(one)}`}
              onClick={() => confirm(`Delete "${titleOf(one)}"?`) && chat.remove(one.id)}
            >
              <Icon name="trash" />
            </button>
          </li>
        ))}
      </ul>
      {conversation.messages.length > 0 && (
        <div class="row">
          <span class="hint"><Icon name="save" /> Export</span>
          <button type="button" class="small" onClick={() => exportConversation(conversation, "markdown")}>Markdown</button>
          <button type="button" class="small" onClick={() => exportConversation(conversation, "json")}>JSON</button>
        </div>
      )}
    </nav>
  );
}
