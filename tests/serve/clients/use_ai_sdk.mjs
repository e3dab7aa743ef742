// @ai-sdk/openai-compatible under the AI SDK: text, stream with usage, a tool, an object.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, Output, streamText, tool } from "ai";

const [url, path] = process.argv.slice(2);
const provider = createOpenAICompatible({
  name: "lapilli",
  baseURL: `${url}/v1`,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider("pebble");
const image = readFileSync(path);
const messages = [
  {
    role: "user",
    content: [
      { type: "file", mediaType: "image/png", data: image },
      { type: "text", text: "What color is the circle?" },
    ],
  },
];
const schema = jsonSchema({
  type: "object",
  properties: { color: { type: "string", enum: ["red", "blue"] } },
  required: ["color"],
  additionalProperties: false,
});

const found = await generateText({ model, messages, maxRetries: 0 });
assert.equal(found.text, "red");
const stream = streamText({ model, messages, maxRetries: 0 });
let said = "";
for await (const piece of stream.textStream) said += piece;
assert.equal(said, "red");
assert.equal((await stream.usage).inputTokens, found.usage.inputTokens);
const painted = [];
const paint = tool({
  description: "Paint a circle.",
  inputSchema: schema,
  execute: async ({ color }) => {
    painted.push(color);
    return "painted";
  },
});
await generateText({ model, messages, tools: { paint }, toolChoice: "required", maxRetries: 0 });
assert.equal(painted.length, 1);
const typed = await generateText({ model, messages, output: Output.object({ schema }), maxRetries: 0 });
assert.ok(["red", "blue"].includes(typed.output.color));
console.log("all of it answered");
