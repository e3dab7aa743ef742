// openai for JavaScript: chat, stream, tools, structured output, responses, errors.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const [url, path] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const uri = `data:image/png;base64,${readFileSync(path).toString("base64")}`;
const model = "pebble";
const text = "What color is the circle?";
const messages = [
  { role: "user", content: [{ type: "image_url", image_url: { url: uri } }, { type: "text", text }] },
];
const schema = {
  type: "object",
  properties: { color: { type: "string", enum: ["red", "blue"] } },
  required: ["color"],
  additionalProperties: false,
};

const found = await client.chat.completions.create({ model, messages });
assert.equal(found.choices[0].message.content, "red");
let said = "";
let usage = null;
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ model, messages, ...options })) {
  said += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(said, "red");
assert.equal(usage.total_tokens, found.usage.total_tokens);
const form = await client.chat.completions.create({
  model,
  messages,
  response_format: { type: "json_schema", json_schema: { name: "circle", strict: true, schema } },
});
assert.ok(JSON.parse(form.choices[0].message.content).color);
const runner = client.chat.completions.stream({
  model,
  messages,
  tools: [{ type: "function", function: { name: "paint", parameters: schema } }],
  tool_choice: "required",
  parallel_tool_calls: false,
});
const called = await runner.finalChatCompletion();
assert.ok(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments).color);

const input = [
  {
    role: "user",
    content: [
      { type: "input_image", image_url: uri, detail: "auto" },
      { type: "input_text", text },
    ],
  },
];
assert.equal((await client.responses.create({ model, input })).output_text, "red");
const kinds = [];
const stream = client.responses.stream({ model, input });
for await (const event of stream) kinds.push(event.type);
assert.equal(kinds.at(-1), "response.completed");
assert.equal((await stream.finalResponse()).output_text, "red");
await assert.rejects(client.chat.completions.create({ model: "gpt-9", messages }), OpenAI.NotFoundError);
console.log("all of it answered");
