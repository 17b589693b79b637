/** An allocation that fails, wherever it is, is reported and leaves no memory behind. */
import { afterAll, expect, test } from "vitest";
import { Generator } from "../../src/infer/engine.ts";
import { evaluate, evaluateIncremental } from "../../src/models/evaluate.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { testAdapters } from "../support/adapters.ts";
import { failEveryAllocation } from "../support/failing_allocator.ts";
import { specModel, tokens } from "./spec_model.ts";
import { CONTINUATION, PROMPT } from "./spec_vectors.ts";

const device = await openDevice({ adapter: (await testAdapters())[0]! });
afterAll(() => device.destroy());
const model = specModel(device);

const ids = tokens.slice(0, 6);
const inputs = { batch: 1, seqlen: 6, input_ids: ids, labels: ids };

test("of the model's parameters", async () => {
  expect(await failEveryAllocation(device, () => specModel(device).dispose(), 9)).toBeGreaterThan(5);
});

test("of an evaluation with gradients", async () => {
  const work = async () => void (await evaluate(model, inputs, { grads: true, internals: true }));
  expect(await failEveryAllocation(device, work, 41)).toBeGreaterThan(5);
});

test("of an incremental evaluation", async () => {
  const work = async () => void (await evaluateIncremental(model, inputs, [4]));
  expect(await failEveryAllocation(device, work, 31)).toBeGreaterThan(3);
});

for (const draft of [0, 2]) {
  test(`of generation with ${draft} drafted tokens`, async () => {
    const failures = await failEveryAllocation(device, async () => {
      const generator = new Generator(model, 12);
      try {
        const found: number[] = [];
        for await (const id of generator.generate(PROMPT, { maxTokens: 4, draft })) found.push(id);
        expect(found).toEqual(CONTINUATION.slice(0, 4));
      } finally {
        generator.dispose();
      }
    }, 17);
    expect(failures).toBeGreaterThan(5);
  });
}

test("a generator goes on after a failure", async () => {
  const generator = new Generator(model, 12);
  const run = async () => {
    const found: number[] = [];
    for await (const id of generator.generate(PROMPT, { maxTokens: 4 })) found.push(id);
    return found;
  };
  device.pool.trim();
  device.pool.ceilingBytes = device.pool.heldBytes;
  await expect(run()).rejects.toThrow(/bytes are left under the pool's ceiling/);
  device.pool.ceilingBytes = Infinity;
  expect(await run()).toEqual(CONTINUATION.slice(0, 4));
  generator.dispose();
  model.dispose();
  expect(device.pool.liveBytes).toBe(0);
});
