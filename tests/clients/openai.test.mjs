// The official client for Node.
import assert from "node:assert/strict";
import test from "node:test";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.MESH_URL}/v1`, apiKey: "none", maxRetries: 0 });
const model = process.env.MESH_MODEL;
const ask = { model, messages: [{ role: "user", content: "Say hello." }], temperature: 0, max_tokens: 24 };

test("streamed is blocking", async () => {
  const whole = await client.chat.completions.create(ask);
  let text = "";
  for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
    text += chunk.choices[0]?.delta?.content ?? "";
  }
  assert.ok(text);
  assert.equal(text, whole.choices[0].message.content);
});

test("a client that leaves is no error", async () => {
  const stream = await client.chat.completions.create({ ...ask, max_tokens: 2000, stream: true });
  for await (const _ of stream) break;
  stream.controller.abort();
  assert.ok((await client.chat.completions.create(ask)).choices[0].message.content);
});

test("forced calls", async () => {
  const parameters = { type: "object", properties: { n: { type: "integer" } }, required: ["n"] };
  const tools = [{ type: "function", function: { name: "f", parameters } }];
  const answer = await client.chat.completions.create({ ...ask, tools, tool_choice: "required", max_tokens: 100 });
  const call = answer.choices[0].message.tool_calls[0];
  assert.equal(call.function.name, "f");
  assert.equal(typeof JSON.parse(call.function.arguments).n, "number");
});

test("embeddings are normalised, or refused by name", async () => {
  try {
    const answer = await client.embeddings.create({ model, input: ["one", "two"] });
    for (const { embedding } of answer.data) {
      assert.ok(Math.abs(Math.hypot(...embedding) - 1) < 1e-3);
    }
  } catch (error) {
    assert.ok(error instanceof OpenAI.BadRequestError, String(error));
  }
});

test("responses", async () => {
  const answer = await client.responses.create({ model, input: "Say hello.", temperature: 0, max_output_tokens: 24 });
  assert.ok(answer.output_text);
});

test("errors are typed", async () => {
  await assert.rejects(client.chat.completions.create({ ...ask, model: "nobody" }), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create({ ...ask, temperature: 9 }), OpenAI.BadRequestError);
});
