// A conversation as a file.

import { download } from "./parts";
import { titleOf } from "./store";
import type { Conversation } from "./types";

/** Save a conversation as Markdown for readers, pictures inside, or as the messages that OpenAI's clients send. */
export function exportConversation(conversation: Conversation, form: "markdown" | "json"): void {
  const name = `lapilli-${new Date(conversation.updated).toISOString().slice(0, 19).replaceAll(":", "")}`;
  if (form === "markdown") download(`${name}.md`, "text/markdown", markdown(conversation));
  else download(`${name}.json`, "application/json", JSON.stringify({ messages: messages(conversation) }, null, 1));
}

function markdown(conversation: Conversation): string {
  const said = conversation.messages.map((one) => {
    const pictures = one.pictures.map((picture) => `![${picture.name.replaceAll(/[[\]]/g, "")}](${picture.url})\n\n`);
    return `## ${one.role === "user" ? "You" : "Answer"}\n\n${pictures.join("")}${one.text}\n`;
  });
  return `# ${titleOf(conversation)}\n\n${said.join("\n")}`;
}

function messages(conversation: Conversation): unknown[] {
  return conversation.messages.map((one) => {
    const pictures = one.pictures.map((picture) => ({ type: "image_url", image_url: { url: picture.url } }));
    const content = pictures.length ? [...pictures, { type: "text", text: one.text }] : one.text;
    return { role: one.role, content };
  });
}
