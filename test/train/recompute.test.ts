import { afterAll, describe, expect, test } from "vitest";
import { recompute } from "../../src/autograd/recompute.ts";
import { Tape } from "../../src/autograd/tape.ts";
import { parseRecompute, RECOMPUTED_MODULES } from "../../src/nn/recompute.ts";
import { linear } from "../../src/ops/linear.ts";
import { rms_norm } from "../../src/ops/rms_norm.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { scope } from "../../src/tensor/scope.ts";
import { makeRecipe } from "../../src/train/recipe.ts";
import type { TrainerOptions } from "../../src/train/trainer.ts";
import { testAdapters } from "../support/adapters.ts";
import { checkPredicted, smallBatches, trainSmall, worstOf } from "../support/layouts.ts";

const device = await openDevice({ adapter: (await testAdapters())[0]! });
afterAll(() => device.destroy());

const batches = smallBatches(2, true);
const options = { steps: 2, clip: 1, aux_loss: 1e-2 } as const;
type More = Partial<Omit<TrainerOptions, "steps">>;

describe("what runs a second time changes no bit and saves memory", () => {
  const plain = new Map<string, ReturnType<typeof trainSmall>>();
  const run = (layout: string, what: string, more: More = {}) =>
    trainSmall(device, layout, batches, { ...options, ...more, recompute: parseRecompute(what) });
  const expected = (layout: string, more: More) => {
    const key = layout + JSON.stringify(more);
    if (!plain.has(key)) plain.set(key, run(layout, "off", more));
    return plain.get(key)!;
  };
  const weighing = { moe: { weighing: "activation" } } as const;

  test.each<[string, string, More?]>([
    ...RECOMPUTED_MODULES.map((module): [string, string] => ["tp=1", module]),
    ["tp=1", "moe_act", weighing], ["tp=1", RECOMPUTED_MODULES.join(",")], ["tp=1", "moe,layernorm"],
    ["tp=1", "shared_experts,layernorm,moe_act", { accumulate: 2 }],
    ["tp=1", "full"], ["tp=1", "full:4"], ["tp=1", "block:2"],
    ["tp=2,pp=2", RECOMPUTED_MODULES.join(",")], ["pp=2", "full:2"], ["dp=2", "full"],
    ["cp=2", "core_attn,mamba,layernorm"], ["dp=2,ep=2", "moe,layernorm"], ["dp=2,ep=2", "moe_act"],
  ])("%s: %s", async (layout, what, more = {}) => {
    const once = await expected(layout, more);
    const before = device.pool.liveBytes;
    const twice = await run(layout, what, more);
    expect(device.pool.liveBytes).toBe(before);
    expect(twice.steps).toEqual(once.steps);
    expect(worstOf(twice.gradients, once.gradients)).toEqual({ name: "none", error: 0 });
    expect(worstOf(twice.parameters, once.parameters)).toEqual({ name: "none", error: 0 });
    twice.held.forEach(({ activations }, rank) =>
      expect(activations).toBeLessThan(once.held[rank]!.activations));
    checkPredicted(twice);
  });
});

describe("results that are given back", () => {
  test("have no memory until a gradient needs them", async () => {
    const { pool } = device;
    const make = (shape: number[]) => {
      const tensor = device.zeros(shape);
      tensor.write(Float32Array.from({ length: tensor.size }, (_, i) => Math.sin(i)));
      tensor.requiresGrad = true;
      return tensor;
    };
    const [x, scale, weight] = [make([64, 64]), make([64]), make([64, 64])];
    const seed = make([64, 64]);
    const gradients = async (discard: boolean | null) => {
      const tape = new Tape();
      const empty = pool.liveBytes;
      const y = tape.run(() => scope(() => {
        const norm = ([u]: readonly (typeof x)[]) => rms_norm(u!, scale, 1e-5);
        const normed = discard === null ? norm([x])
          : recompute([x], (_, inputs) => [norm(inputs)], { discard })[0]!;
        return linear(normed.reshape([8, 8, 64]), weight, null);
      }));
      const kept = pool.liveBytes - empty - y.byteLength;
      const found = tape.backward([y], [seed]);
      const values = await Promise.all([x, scale, weight].map(({ key }) => found.get(key)!.read()));
      for (const gradient of found.values()) gradient.release();
      y.dispose();
      expect(pool.liveBytes).toBe(empty);
      return { kept, values };
    };
    const [plain, held, given] = [await gradients(null), await gradients(false), await gradients(true)];
    expect(held.values).toEqual(plain.values);
    expect(given.values).toEqual(plain.values);
    expect(held.kept).toBe(64 * 64 * 4);
    expect(given.kept).toBe(0);
    for (const tensor of [x, scale, weight, seed]) tensor.dispose();
  });
});

test("what is recomputed is read from text", () => {
  expect(parseRecompute("full")).toEqual({ layers: 1, first: Infinity, modules: new Set() });
  expect(parseRecompute("full:3").layers).toBe(3);
  expect(parseRecompute("block:2").first).toBe(2);
  expect([...parseRecompute("moe_act, layernorm").modules]).toEqual(["moe_act", "layernorm"]);
  for (const text of ["", "full:0", "block", "moe_act,softmax"]) {
    expect(() => parseRecompute(text)).toThrow(/must be off, full, .* found "/);
  }
  expect(() => makeRecipe({ recompute: "all" })).toThrow(/found "all"/);
  // Runs of older versions have a flag.
  const older = (recompute: boolean) => makeRecipe({ recompute } as unknown as { recompute: string });
  expect([older(true).recompute, older(false).recompute]).toEqual(["full", "off"]);
});
