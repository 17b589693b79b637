import { afterAll, describe, expect, test } from "vitest";
import { openCheckpoint, saveCheckpoint } from "../../src/io/checkpoint_files.ts";
import { localFileLayer } from "../../src/io/files.node.ts";
import { memoryToTrain } from "../../src/models/accounting.ts";
import { NemotronH } from "../../src/models/nemotron_h.ts";
import { createParameters } from "../../src/models/parameters.ts";
import { preset } from "../../src/models/presets.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { checkpointFiles, restoreRun, savedRun } from "../../src/train/checkpoint.ts";
import { AdamW } from "../../src/train/optimizer.ts";
import { makeRecipe, type Recipe } from "../../src/train/recipe.ts";
import { TrainingRun } from "../../src/train/run.ts";
import { withFolder } from "../cli/krait.ts";
import { Draw } from "../ops/suite.ts";
import { bitsOf } from "../support/state.ts";
import { testAdapters } from "../support/adapters.ts";

/** What a format means is tested on every adapter, op by op. */
const device = await openDevice({ adapter: (await testAdapters())[0]! });
afterAll(() => device.destroy());

const config = preset("unit");
const tokens = Int32Array.from(new Draw(5).integers([300], 0, config.vocab_size).data);
const corpus = { tokens, starts: Int32Array.from([0]), bytes: 300, scored: 299, eosId: 2 };
type Formats = Pick<Recipe, "weights" | "master" | "moments">;

function start(formats: Partial<Recipe>) {
  const recipe = makeRecipe({ steps: 40, batch: 2, seqlen: 16, schedule: "constant", warmup: 1, ...formats });
  const model = new NemotronH(config, createParameters(device, config, 1, recipe.weights));
  const run = new TrainingRun(model, recipe, corpus, corpus);
  const step = async (count: number) => {
    const losses: number[] = [];
    for (let i = 0; i < count; i++) losses.push((await run.step()).total);
    return losses;
  };
  const state = async () => {
    const all: Uint8Array[] = [];
    for (const view of [...model.parameters.values(), ...run.trainer.optimizers[0]!.state]) {
      all.push(await bitsOf(view));
    }
    return all;
  };
  const dispose = () => {
    run.dispose();
    model.dispose();
  };
  return { recipe, run, step, state, dispose };
}

const FORMATS: [string, Formats][] = ([
  ["f32", "f32", "f32"], ["f32", "f32", "bf16"], ["f32", "f32", "8bit"], ["bf16", "f32", "f32"],
  ["bf16", "f32", "8bit"], ["bf16", "none", "8bit"],
] as const).map(([weights, master, moments]) =>
  [`${weights} weights, ${master} masters, ${moments} moments`, { weights, master, moments }]);

describe.each(FORMATS)("%s", (_, formats) => {
  test("take the bytes that are stated", () => {
    const whole = preset("tiny");
    const before = device.pool.liveBytes;
    const model = new NemotronH(whole, createParameters(device, whole, 1, formats.weights));
    const trained = new Map([...model.parameters].filter(([, { requiresGrad }]) => requiresGrad));
    const optimizer = new AdamW(trained, {
      betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, clip: 1, ...formats,
    });
    const found = device.pool.liveBytes - before;
    optimizer.dispose();
    model.dispose();
    const { weights, gradients, optimizer: moments } = memoryToTrain(whole, 0, formats);
    const stated = weights + gradients + moments;
    // Above that: gaps, since tensors start at multiples of 256 bytes, and the pool's own rounding.
    expect(found / stated).toBeGreaterThanOrEqual(1);
    expect(found / stated).toBeLessThan(1.06);
  });

  test("learn as f32 does, and go on from a checkpoint bit for bit", () => withFolder(async (folder) => {
    const first = start(formats);
    const losses = await first.step(12);
    const plain = start({});
    const expected = await plain.step(12);
    losses.forEach((loss, i) => expect(Math.abs(loss / expected[i]! - 1), `step ${i}`).toBeLessThan(0.01));
    plain.dispose();

    const layer = localFileLayer();
    const files = checkpointFiles(first.run, {}, savedRun(first.run, first.recipe));
    await saveCheckpoint(layer, folder, 12, files);
    const rest = await first.step(4);
    const checkpoint = (await openCheckpoint(layer, folder))!;
    const later = start(formats);
    await restoreRun(later.run, checkpoint);
    expect(await later.step(4)).toEqual(rest);
    expect(await later.state()).toEqual(await first.state());
    for (const other of [{ moments: formats.moments === "f32" ? "bf16" : "f32" } as const,
      { weights: formats.weights === "f32" ? "bf16" : "f32", master: "f32" } as const]) {
      const run = start({ ...formats, ...other });
      const [key, wanted] = Object.entries(other)[0]!;
      await expect(restoreRun(run.run, checkpoint)).rejects.toThrow(
        `was trained with ${key} ${formats[key as keyof Formats]}, and a run with ${key} ${wanted} cannot`);
      run.dispose();
    }
    first.dispose();
    later.dispose();
  }));
});

test("formats that do not exist, or do not go together, are refused", () => {
  expect(() => makeRecipe({ moments: "4bit" as never })).toThrow(/moments must be f32, bf16, 8bit.*4bit/);
  expect(() => makeRecipe({ weights: "fp8" as never })).toThrow(/weights must be f32 or bf16, found fp8/);
  expect(() => makeRecipe({ master: "none" })).toThrow(/master must be f32 for.*found none/);
});

test("a run that ends for want of finite numbers names its formats", async () => {
  const { run, step, dispose } = start({ weights: "bf16", moments: "8bit", max_skipped: 1 });
  run.model.norm_f.write(new Float32Array(config.hidden_size).fill(Infinity));
  await expect(step(1)).rejects.toThrow(/\(with bf16 weights and 8bit moments\)/);
  dispose();
  const other = start({ precision: "mxfp8", max_skipped: 1 });
  other.run.model.norm_f.write(new Float32Array(config.hidden_size).fill(Infinity));
  await expect(other.step(1)).rejects.toThrow(/\(with precision mxfp8\)/);
  other.dispose();
});
