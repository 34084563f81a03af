// Vercel's AI SDK with the default model of @ai-sdk/openai, which speaks the Responses API, and with its chats.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { Output, generateText, isStepCount, streamText, tool } from "ai";
import { z } from "zod";

const openai = createOpenAI(); // OPENAI_BASE_URL and OPENAI_API_KEY are set
const Weather = z.object({ city: z.enum(["Oslo", "Rome"]), is_warm: z.boolean() });

for (const model of [openai(process.env.MODEL), openai.chat(process.env.MODEL)]) {
  const { text, usage, response } = await generateText({ model, instructions: "You add.", prompt: "What is 47 + 38?" });
  console.log(model.provider, text, usage.totalTokens);
  assert.equal(text, "47 + 38 = 85.");

  const history = [{ role: "user", content: "What is 47 + 38?" }, ...response.messages];
  const stream = streamText({ model, messages: [...history, { role: "user", content: "Count from 3 to 9." }] });
  let streamed = "";
  for await (const delta of stream.textStream) streamed += delta;
  console.log("stream:", streamed);
  assert.equal(streamed, "3, 4, 5, 6, 7, 8, 9.");

  const called = await generateText({
    model,
    prompt: "Ask me something.",
    tools: {
      get_question: tool({
        description: "Get a question of a kind.",
        inputSchema: z.object({ kind: z.enum(["sum", "count"]) }),
        strict: true,
        execute: async () => "What is 12 + 35?",
      }),
    },
    stopWhen: isStepCount(2),
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "auto" }),
  });
  console.log("tool:", called.steps[0].toolCalls[0].input, called.text);
  assert.equal(called.text, "12 + 35 = 47.");

  const structured = await generateText({ model, prompt: "How is the weather?", output: Output.object({ schema: Weather }) });
  console.log("structured:", structured.output);
  Weather.parse(structured.output);
}
