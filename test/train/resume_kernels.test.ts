import { afterAll, expect, test } from "vitest";
import { localFileLayer } from "../../src/io/files.node.ts";
import { openCheckpoint, saveCheckpoint } from "../../src/io/checkpoint_files.ts";
import { type ChoiceTable, parseClass, tunables } from "../../src/kernel/tuner.ts";
import { NemotronH } from "../../src/models/nemotron_h.ts";
import { createParameters } from "../../src/models/parameters.ts";
import { preset } from "../../src/models/presets.ts";
import { type Device, openDevice } from "../../src/tensor/device.ts";
import { checkpointFiles, restoreRun, savedRun, type SavedRun } from "../../src/train/checkpoint.ts";
import { makeRecipe } from "../../src/train/recipe.ts";
import { TrainingRun } from "../../src/train/run.ts";
import { withFolder } from "../cli/krait.ts";
import { Draw } from "../ops/suite.ts";
import { testAdapters } from "../support/adapters.ts";

const [adapter] = await testAdapters();
const devices: Device[] = [];
afterAll(() => devices.forEach((device) => device.destroy()));

const config = preset("unit");
const recipe = makeRecipe({ steps: 8, batch: 1, seqlen: 16, warmup: 1 });
const tokens = Int32Array.from(new Draw(5).integers([200], 0, config.vocab_size).data);
const corpus = { tokens, starts: Int32Array.from([0]), bytes: 200, scored: 199, eosId: 2 };

/** A run on a new device that has these measurements. */
async function start(measured: ChoiceTable) {
  const device = await openDevice({ adapter: adapter! });
  devices.push(device);
  device.choices.load(measured);
  const run = new TrainingRun(new NemotronH(config, createParameters(device, config, 1)), recipe, corpus,
    corpus);
  const step = async (count: number) => {
    const losses: number[] = [];
    for (let i = 0; i < count; i++) losses.push((await run.step()).total);
    return losses;
  };
  return { device, run, step };
}

/** For every class of norms that a device used: another kernel than it took; those compile quickly. */
function others(device: Device): ChoiceTable {
  const table: Record<string, Record<string, string>> = {};
  for (const { tunable, class: text, choice } of device.choices.used) {
    const other = tunables.get(tunable)!.candidates(device, parseClass(text)!).find(
      (each) => each !== choice);
    if (tunable.startsWith("norm/") && other !== undefined) (table[tunable] ??= {})[text] = other;
  }
  return table;
}

test("a resumed run computes with the kernels of the run before it, whatever was measured since", () =>
  withFolder(async (folder) => {
    const layer = localFileLayer();
    const first = await start({});
    await first.step(2);
    const measured = others(first.device);
    expect(Object.keys(measured).length).toBeGreaterThan(0);
    const state = savedRun(first.run, recipe);
    const { kernels, ...old } = state;
    expect(kernels).toEqual({ adapter: adapter!.info.id, choices: first.device.choices.table() });
    const save = (name: string, saved: SavedRun) =>
      saveCheckpoint(layer, `${folder}/${name}`, 2, checkpointFiles(first.run, {}, saved));
    await save("whole", state);
    await save("old", old);
    await save("elsewhere", { ...state, kernels: { ...kernels!, adapter: "another" } });
    await save("strange", { ...state,
      kernels: { ...kernels!, choices: { "norm/rms_norm": null } } as never });
    const expected = await first.step(3);

    const resume = async (name: string) => {
      const later = await start(measured);
      await restoreRun(later.run, (await openCheckpoint(layer, `${folder}/${name}`))!);
      const losses = await later.step(3);
      return { losses, choices: later.device.choices.table() };
    };
    expect(await resume("whole")).toEqual({ losses: expected, choices: kernels!.choices });
    // Without the record, or with that of another adapter, what was measured holds: close, but not the bits.
    const without = adapter!.info.id === "swiftshader" ? ["old"] : ["old", "elsewhere", "strange"];
    for (const name of without) {
      const { losses, choices } = await resume(name);
      expect(choices).toMatchObject(measured);
      losses.forEach((loss, i) => expect(Math.abs(loss / expected[i]! - 1)).toBeLessThan(1e-5));
    }
  }));
