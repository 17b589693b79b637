import { afterAll, describe, expect, test } from "vitest";
import { OFFLOADED_MODULES, parseOffload } from "../../src/nn/offload.ts";
import { parseRecompute } from "../../src/nn/recompute.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { makeRecipe } from "../../src/train/recipe.ts";
import type { TrainerOptions } from "../../src/train/trainer.ts";
import { testAdapters } from "../support/adapters.ts";
import { smallBatches, trainSmall, worstOf } from "../support/layouts.ts";

const device = await openDevice({ adapter: (await testAdapters())[0]! });
afterAll(() => device.destroy());

const batches = smallBatches(2, true);

describe("what lies in host memory changes no bit and takes no memory of the device", () => {
  type More = Partial<Omit<TrainerOptions, "steps">>;
  const run = (layout: string, what: string, more: More & { after?: () => void }) =>
    trainSmall(device, layout, batches, {
      steps: 3, clip: 1, host_elements: 2048, ...more, offload: { ...parseOffload(what), least: 1024 },
    });
  const plain = new Map<string, ReturnType<typeof run>>();

  test.each<[string, string, More?]>([
    ["tp=1", "activations"], ["tp=1", "activations=mamba+layernorm"], ["tp=1", "optimizer"],
    ["tp=1", "activations", { recompute: parseRecompute("layernorm,moe_act,core_attn") }],
    ["tp=1", "activations", { recompute: parseRecompute("full:2") }],
    ["tp=2,pp=2", "activations,optimizer"], ["dp=2,ep=2", "activations=moe,optimizer"],
  ])("%s: %s", async (layout, what, more = {}) => {
    const key = layout + JSON.stringify(more.recompute);
    const before = device.pool.liveBytes;
    if (!plain.has(key)) plain.set(key, run(layout, "off", more));
    const here = await plain.get(key)!;
    const made: number[] = [];
    const away = await run(layout, what, { ...more, after: () => made.push(device.stream.stagingCreated) });
    expect(made[2]).toBe(made[0]);
    expect(device.pool.liveBytes).toBe(before);
    expect(away.steps).toEqual(here.steps);
    expect(worstOf(away.gradients, here.gradients)).toEqual({ name: "none", error: 0 });
    expect(worstOf(away.parameters, here.parameters)).toEqual({ name: "none", error: 0 });
    const { activations, optimizer } = parseOffload(what);
    away.held.forEach((held, rank) => {
      const kept = here.held[rank]!;
      if (activations.size > 0) expect(held.activations).toBeLessThan(0.9 * kept.activations);
      expect(held.optimizer).toBe(optimizer ? 0 : kept.optimizer);
    });
    // The most that layers run again take at one time does not lie there.
    if (activations.size > 0 && !more.recompute?.layers) expect(away.peak).toBeLessThan(here.peak);
    // One bucket of both moments at a time.
    if (optimizer) expect(away.peak - here.peak).toBeLessThan(0.5 * here.held[0]!.optimizer);
  });
});

test("what is offloaded is read from text", () => {
  expect([...parseOffload("activations").activations]).toEqual([...OFFLOADED_MODULES]);
  const { activations, optimizer } = parseOffload("optimizer, activations=moe+layernorm");
  expect([[...activations], optimizer]).toEqual([["moe", "layernorm"], true]);
  for (const text of ["", "all", "activations=", "activations=moe+norm", "optimizer,off"]) {
    expect(() => parseOffload(text)).toThrow(/must be off, or optimizer and activations .* found "/);
  }
  expect(() => makeRecipe({ offload: "gradients" })).toThrow(/found "gradients"/);
});
