// OpenAI's client for Node: chats, streams, tools that it runs, parsed answers, and responses.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI(); // OPENAI_BASE_URL and OPENAI_API_KEY are set
const model = process.env.MODEL;
const SUM = { role: "user", content: "What is 47 + 38?" };
const Weather = z.object({ city: z.enum(["Oslo", "Rome"]), is_warm: z.boolean() });

const answer = await client.chat.completions.create({ model, messages: [SUM] });
console.log("chat:", answer.choices[0].message.content);
assert.equal(answer.choices[0].message.content, "47 + 38 = 85.");

const stream = client.chat.completions.stream({
  model,
  messages: [SUM, answer.choices[0].message, { role: "user", content: "Count from 3 to 9." }],
});
let text = "";
stream.on("content", (delta) => (text += delta));
const whole = await stream.finalChatCompletion();
console.log("stream:", text);
assert.equal(text, "3, 4, 5, 6, 7, 8, 9.");
assert.equal(whole.choices[0].message.content, text);

const parsed = await client.chat.completions.parse({
  model,
  messages: [SUM],
  response_format: zodResponseFormat(Weather, "weather"),
});
console.log("parsed:", parsed.choices[0].message.parsed);
Weather.parse(parsed.choices[0].message.parsed);

const asked = [];
const runner = client.chat.completions.runTools({
  model,
  messages: [{ role: "user", content: "Ask me something." }],
  tool_choice: { type: "function", function: { name: "get_question" } },
  tools: [
    {
      type: "function",
      function: {
        name: "get_question",
        description: "Get a question of a kind.",
        parse: JSON.parse,
        function: ({ kind }) => {
          asked.push(kind);
          return "What is 12 + 35?";
        },
        parameters: {
          type: "object",
          properties: { kind: { type: "string", enum: ["sum", "count"] } },
          required: ["kind"],
          additionalProperties: false,
        },
      },
    },
  ],
});
await runner.done(); // with one named function the runner ends after its call
console.log("tool:", asked, runner.messages.at(-1));
assert.equal(asked.length, 1);
const after = await client.chat.completions.create({ model, messages: runner.messages });
console.log("after the tool:", after.choices[0].message.content);
assert.equal(after.choices[0].message.content, "12 + 35 = 47.");

const response = await client.responses.create({ model, input: "Remember: dog parrot, eagle maple.", stream: true });
let completed;
for await (const event of response) {
  if (event.type === "response.completed") completed = event.response;
}
const next = await client.responses.create({ model, input: "What is eagle?", previous_response_id: completed.id });
console.log("response:", next.output_text);
assert.equal(next.output_text, "You said eagle maple.");
const typed = await client.responses.parse({ model, input: [SUM], text: { format: zodTextFormat(Weather, "weather") } });
console.log("parsed response:", typed.output_parsed);
Weather.parse(typed.output_parsed);
