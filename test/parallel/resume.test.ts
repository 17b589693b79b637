import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { openCheckpoint, saveCheckpoint } from "../../src/io/checkpoint_files.ts";
import { localFileLayer } from "../../src/io/files.node.ts";
import { parseLayout, worldOf } from "../../src/parallel/layout.ts";
import { MeshModel } from "../../src/parallel/model.ts";
import { type Device, openDevice } from "../../src/tensor/device.ts";
import { checkpointFiles, restoreRun, savedRun } from "../../src/train/checkpoint.ts";
import { makeRecipe, type Recipe } from "../../src/train/recipe.ts";
import { TrainingRun } from "../../src/train/run.ts";
import { withFolder } from "../cli/krait.ts";
import { Draw } from "../ops/suite.ts";
import { testAdapters } from "../support/adapters.ts";
import { SMALL } from "../support/layouts.ts";

const device = await openDevice({ adapter: (await testAdapters())[0]! });
afterAll(() => device.destroy());

const tokens = Int32Array.from(new Draw(5).integers([900], 0, SMALL.vocab_size).data);
const corpus = { tokens, starts: Int32Array.from([0, 300]), bytes: 900, scored: 898, eosId: 2 };
const plain = makeRecipe({ steps: 8, batch: 1, seqlen: 32, accumulate: 4, warmup: 1 });

function start(text: string, recipe: Recipe) {
  const layout = parseLayout(text);
  const mesh = MeshModel.on(Array<Device>(worldOf(layout)).fill(device), layout, SMALL, recipe.weights);
  mesh.initialise(recipe.seed);
  const run = new TrainingRun(mesh, recipe, corpus, corpus);
  return {
    run, dispose: () => {
      run.dispose();
      mesh.dispose();
    },
  };
}

describe("a run goes on under any layout", () => {
  for (const [name, recipe, layouts] of [
    ["f32", plain, ["tp=1", "dp=2", "tp=2,cp=2", "tp=2,dp=2,pp=2", "pp=2,vpp=2"]],
    ["bf16 weights with masters", makeRecipe({ ...plain, weights: "bf16", moments: "bf16" }),
      ["dp=4", "tp=4", "pp=3"]],
    ["moments of 8 bits", makeRecipe({ ...plain, moments: "8bit" }), ["tp=1", "pp=2", "dp=4,ep=2"]],
    ["scales of FP8 from earlier updates", makeRecipe({ ...plain, precision: "fp8-delayed" }),
      ["tp=1", "cp=2,dp=2,ep=2"]],
  ] as const) {
    test(name, () => withFolder(async (folder) => {
      const layer = localFileLayer();
      const save = async ({ run }: ReturnType<typeof start>, to: string) => {
        const files = checkpointFiles(run, {}, savedRun(run, recipe));
        return join(folder, to, await saveCheckpoint(layer, join(folder, to), run.trainer.steps, files));
      };
      const stored = ["model", "optimizer", ...recipe.precision === "f32" ? [] : ["precision"]];
      const weightsOf = (path: string) => Promise.all(
        stored.map((file) => readFile(join(path, `${file}.safetensors`))));
      let from = await (async () => {
        const first = start(layouts.at(-1)!, recipe);
        for (let i = 0; i < 2; i++) await first.run.step();
        const path = await save(first, "first");
        first.dispose();
        return { path, to: "first" };
      })();
      const expected = await weightsOf(from.path);
      const losses: number[][] = [];
      for (const layout of layouts) {
        const later = start(layout, recipe);
        const saved = await restoreRun(later.run, (await openCheckpoint(layer, join(folder, from.to)))!);
        expect(saved.steps).toBe(2);
        const again = { path: await save(later, layout), to: layout };
        const files = await weightsOf(again.path);
        files.forEach((file, i) => expect(file.equals(expected[i]!), layout).toBe(true));
        const two = [];
        for (let i = 0; i < 2; i++) two.push((await later.run.step()).loss);
        losses.push(two);
        later.dispose();
        from = again;
      }
      const isRough = recipe.moments !== "f32"; // each draws its own bits
      for (const two of losses) two.forEach((loss, i) =>
        expect(Math.abs(loss / losses[0]![i]! - 1)).toBeLessThan(isRough ? 2e-3 : 1e-5));
    }));
  }
});

describe("a run goes on with and without its state in host memory, to the same files", () => {
  for (const [layout, given] of [
    ["dp=2", {}], ["tp=1", { weights: "bf16", moments: "8bit" }],
  ] as const) {
    test(`${layout} ${JSON.stringify(given)}`, () => withFolder(async (folder) => {
      const layer = localFileLayer();
      /** Two steps from the checkpoint in `source`, or from the start. @returns the files */
      const go = async (offload: string, source: string | null, to: string) => {
        const recipe = makeRecipe({ ...plain, ...given, offload, accumulate: 2 });
        const { run, dispose } = start(layout, recipe);
        try {
          if (source) await restoreRun(run, (await openCheckpoint(layer, join(folder, source)))!);
          for (let i = 0; i < 2; i++) await run.step();
          const files = checkpointFiles(run, {}, savedRun(run, recipe));
          const name = await saveCheckpoint(layer, join(folder, to), run.trainer.steps, files);
          return await Promise.all(["model.safetensors", "optimizer.safetensors"].map(
            (file) => readFile(join(folder, to, name, file))));
        } finally {
          dispose();
        }
      };
      const [here, away] = [await go("off", null, "here"), await go("optimizer", null, "away")];
      expect(away.map((file, i) => file.equals(here[i]!))).toEqual([true, true]);
      const [on, off] = [await go("off", "away", "on"), await go("optimizer,activations", "here", "off")];
      expect(off.map((file, i) => file.equals(on[i]!))).toEqual([true, true]);
      expect(on[1]!.equals(here[1]!)).toBe(false);
    }));
  }
});
