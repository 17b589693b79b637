/** What a training checkpoint holds beside the model, and how a run continues from it. */
import { openSafetensors, safetensorsPieces, type TensorEntry } from "../io/safetensors.ts";
import type { CheckpointContent, SavedCheckpoint } from "../io/checkpoint_files.ts";
import type { ChoiceTable } from "../kernel/tuner.ts";
import { readParameters, storedFiles } from "../models/checkpoint.ts";
import { formatLayout } from "../parallel/layout.ts";
import { FormatError } from "../tensor/errors.ts";
import { restoreState, stateEntries } from "./optimizer_state.ts";
import type { PackingState } from "./packing.ts";
import type { Recipe } from "./recipe.ts";
import type { TrainingRun } from "./run.ts";
import type { SkippedSteps } from "./trainer.ts";

/** Scales of FP8 that follow from earlier updates, where a run has them. */
const SCALES = "precision.safetensors";

/** state.json: where the run stands. */
export interface SavedRun {
  readonly format: "krait-training-state";
  /** Steps done. */
  readonly steps: number;
  /** Those that changed nothing; older runs have none. */
  readonly skipped?: SkippedSteps;
  readonly recipe: Recipe;
  readonly packing: PackingState;
  /** Hash of the tokens and of their order. */
  readonly data: string;
  /** On what ranks, as text; any others can go on. Older runs have one rank. */
  readonly layout?: string;
  /** Which kernels computed it, and on what adapter: to go on with the same bits. Older runs do not say. */
  readonly kernels?: { readonly adapter: string; readonly choices: ChoiceTable };
}

export function savedRun(run: TrainingRun, recipe: Recipe): SavedRun {
  const { device } = run.model;
  return {
    format: "krait-training-state", steps: run.trainer.steps, skipped: run.trainer.skipped, recipe,
    packing: run.packer.state, data: run.packer.fingerprint, layout: formatLayout(run.mesh.layout),
    kernels: { adapter: device.info.id, choices: device.choices.table() },
  };
}

/** The files of a training checkpoint: the model's own, the optimiser's moments and the run's state. */
export function checkpointFiles(
  run: TrainingRun, modelExtras: Readonly<Record<string, string>>, state: SavedRun,
): Record<string, CheckpointContent> {
  const precision = (run.trainer.precision?.state ?? []).map(({ name, shape, read }): TensorEntry => ({
    name, dtype: "F32", shape, bytes: async () => new Uint8Array((await read()).buffer),
  }));
  const { mesh, trainer: { optimizers } } = run;
  const entries = stateEntries(mesh, optimizers);
  return {
    ...storedFiles(mesh.config, ({ name }) => mesh.stored(name)), ...modelExtras,
    "optimizer.safetensors": safetensorsPieces(entries),
    ...(precision.length > 0 ? { [SCALES]: safetensorsPieces(precision) } : {}),
    "state.json": `${JSON.stringify(state, null, 2)}\n`,
  };
}

/** Reads state.json of a checkpoint. @throws FormatError when it has none, or not of this kind. */
export async function readSavedRun(checkpoint: SavedCheckpoint): Promise<SavedRun> {
  const text = new TextDecoder().decode(await checkpoint.read("state.json"));
  const state = JSON.parse(text) as SavedRun;
  if (state.format !== "krait-training-state") {
    throw new FormatError(`${checkpoint.path}: state.json is no training state.`);
  }
  return state;
}

/**
 * Puts a run where a checkpoint left off: parameters, moments, position in the data.
 * @throws FormatError when the checkpoint belongs to other data or another model.
 */
export async function restoreRun(run: TrainingRun, checkpoint: SavedCheckpoint): Promise<SavedRun> {
  const state = await readSavedRun(checkpoint);
  if (state.data !== run.packer.fingerprint) {
    throw new FormatError(
      `${checkpoint.path} was trained on other data, or with another order of it: expected fingerprint ` +
      `${state.data}, found ${run.packer.fingerprint}.`);
  }
  for (const key of ["weights", "master", "moments"] as const) {
    const saved = state.recipe[key] ?? "f32";
    if (saved === run.recipe[key]) continue;
    throw new FormatError(
      `${checkpoint.path} was trained with ${key} ${saved}, and a run with ${key} ${run.recipe[key]} ` +
      "cannot continue from it.");
  }
  const model = await openSafetensors(await checkpoint.open("model.safetensors"));
  await readParameters(run.mesh.config, model, async (name, values) => run.mesh.write(name, await values()));
  await model.close();
  const file = await openSafetensors(await checkpoint.open("optimizer.safetensors"));
  try {
    await restoreState(run.mesh, run.trainer.optimizers, async ({ name, dtype, shape }) => {
      const found = file.info(name);
      if (found.dtype !== dtype || found.shape.join() !== shape.join()) {
        throw new FormatError(
          `${checkpoint.path}: expected ${name} as ${dtype} [${shape.join(", ")}], found ${found.dtype} ` +
          `[${found.shape.join(", ")}].`);
      }
      return file.read(name);
    });
  } finally {
    await file.close();
  }
  run.packer.restore(state.packing);
  run.trainer.steps = state.steps;
  if (state.skipped) run.trainer.skipped = state.skipped;
  const scales = run.trainer.precision?.state ?? [];
  if (scales.length > 0) {
    const saved = await openSafetensors(await checkpoint.open(SCALES));
    for (const { name, write } of scales) write(await saved.readTensorF32(name));
    await saved.close();
  }
  const { device } = run.model;
  if (state.kernels?.adapter === device.info.id) device.choices.pin(state.kernels.choices);
  return state;
}
