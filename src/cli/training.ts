/**
 * A training run with its files: metrics, checkpoints, loss curve.
 * Shared by `krait train` and the quickstart.
 */
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { localFileLayer, openFolder } from "../io/files.node.ts";
import { openCheckpoint, saveCheckpoint } from "../io/checkpoint_files.ts";
import { openTensors } from "../io/safetensors.ts";
import { readParameters } from "../models/checkpoint.ts";
import type { NemotronHConfig } from "../models/config.ts";
import type { Layout } from "../parallel/layout.ts";
import { MeshModel } from "../parallel/model.ts";
import type { Device } from "../tensor/device.ts";
import { ExpertOverflow, FormatError, KraitError } from "../tensor/errors.ts";
import type { Tokenizer } from "../text/tokenizer.ts";
import { checkpointFiles, restoreRun, type SavedRun, savedRun } from "../train/checkpoint.ts";
import { lossCurve } from "../train/curve.ts";
import type { DataSplit } from "../train/data.ts";
import { MetricsWriter, readMetrics } from "../train/metrics.node.ts";
import { type NgramBaselines, ngramBaselines } from "../train/ngram.ts";
import { bitsPerByte, tokenizeDocuments } from "../train/packing.ts";
import type { Recipe } from "../train/recipe.ts";
import { type Evaluation, type RunStep, TrainingRun } from "../train/run.ts";
import type { StepTrace } from "../train/trace.ts";

export interface TrainingOptions {
  /** That of every rank of the layout. */
  readonly devices: readonly Device[];
  readonly layout: Layout;
  readonly config: NemotronHConfig;
  readonly recipe: Recipe;
  readonly split: DataSplit;
  readonly tokenizer: Tokenizer;
  /** Kept beside the weights. */
  readonly tokenizerFiles: Readonly<Record<string, string>>;
  readonly out: string;
  /** Whether ranks that share parameters divide their update; default true. */
  readonly zero?: boolean;
  /** Parameters whose gradients are summed over ranks in one go, at most: see `MeshModel.on`. */
  readonly bucketSize?: number | undefined;
  /** Folder with the weights that a new run starts from; default: random ones. */
  readonly init?: string | null;
  /** Continue from the newest checkpoint in `out`. */
  readonly resume: boolean;
  /** Steps between checkpoints, and how many of them to keep. */
  readonly saveEvery: number;
  readonly keep: number;
  readonly signal: AbortSignal;
  /** Called before the first step. */
  readonly onStart?: (run: TrainingRun, baselines: NgramBaselines) => void;
  readonly onStep?: (step: RunStep) => void;
  /** Called once, after the step that was traced, which is number `step` from 1; without it none is. */
  readonly onTrace?: ((trace: StepTrace, run: TrainingRun, step: number) => void) | undefined;
  readonly onEvaluation?: (step: number, evaluation: Evaluation) => void;
}

export interface TrainingResult {
  readonly run: TrainingRun;
  readonly baselines: NgramBaselines;
  readonly evaluation: Evaluation | null;
  /** Folder of the newest checkpoint. */
  readonly checkpoint: string;
  readonly interrupted: boolean;
}

/**
 * Trains to the end of the recipe or until interrupted; either way the newest state is on disk afterwards.
 */
export async function runTraining(options: TrainingOptions): Promise<TrainingResult> {
  const { devices, layout, recipe, split, tokenizer, out, signal } = options;
  const corpus = tokenizeDocuments(split.train, tokenizer);
  const validation = tokenizeDocuments(split.validation, tokenizer);
  const baselines = ngramBaselines(corpus, validation, options.config.vocab_size);
  const layer = localFileLayer();
  const previous = await openCheckpoint(layer, out);
  if (options.resume && !previous) throw new KraitError(`There is no checkpoint in ${out} to resume from.`);
  if (!options.resume && previous) {
    throw new KraitError(
      `${out} already holds a run (its newest checkpoint is ${previous.name}); give another --out, ` +
      "or --resume.");
  }
  checkCorpusSize(corpus.tokens.length, recipe);
  const { config } = options;
  const mesh = MeshModel.on(devices, layout, config, recipe.weights, options.bucketSize);
  if (!previous && options.init) await readWeights(mesh, options.init);
  else if (!previous) mesh.initialise(recipe.seed);
  const run = new TrainingRun(mesh, recipe, corpus, validation, options.zero);
  let saved: SavedRun | null = null;
  if (previous) saved = await restoreRun(run, previous);
  mkdirSync(out, { recursive: true });
  const metrics = new MetricsWriter(join(out, "metrics.jsonl"), saved ? saved.steps : undefined);
  let checkpoint = previous?.path ?? "";
  let savedAt = saved?.steps ?? -1;
  const save = async () => {
    const { steps } = run.trainer;
    if (savedAt === steps) return;
    const files = checkpointFiles(run, options.tokenizerFiles, savedRun(run, recipe));
    checkpoint = join(out, await saveCheckpoint(layer, out, steps, files, { keep: options.keep }));
    savedAt = steps;
    metrics.flush();
  };
  let evaluation: Evaluation | null = null;
  const evaluate = async () => {
    evaluation = await run.evaluate();
    const step = run.trainer.steps;
    metrics.write({ step, val_loss: evaluation.loss, val_bits_per_byte: evaluation.bits_per_byte });
    options.onEvaluation?.(step, evaluation);
  };

  try {
    options.onStart?.(run, baselines);
    while (run.trainer.steps < recipe.steps && !signal.aborted) {
      const step = await tracedStep(run, options.onTrace);
      const { step: index, mtp_loss, max_violation, ...rest } = step;
      metrics.write({
        step: index + 1, ...rest,
        ...Object.fromEntries(mtp_loss.map((loss, i) => [`mtp_loss_${i + 1}`, loss])),
        max_violation, live_bytes: bytesOn(devices, "liveBytes"), peak_bytes: bytesOn(devices, "peakBytes"),
      });
      options.onStep?.(step);
      const done = run.trainer.steps;
      if (recipe.eval_every > 0 && done % recipe.eval_every === 0 && done < recipe.steps) await evaluate();
      if (options.saveEvery > 0 && done % options.saveEvery === 0) await save();
    }
    if (!signal.aborted) await evaluate();
    await save();
  } catch (error) {
    // The step was not done: what was learnt before it goes on with other limits.
    if (error instanceof ExpertOverflow) await save();
    throw error;
  } finally {
    metrics.close();
  }
  writeCurve(
    join(out, "loss.svg"), join(out, "metrics.jsonl"), baselines, (loss) => bitsPerByte(loss, validation));
  return { run, baselines, evaluation, checkpoint, interrupted: signal.aborted };
}

/** Gives every rank its share of a checkpoint's weights. @throws FormatError when they do not fit. */
async function readWeights(mesh: MeshModel, folder: string): Promise<void> {
  const reader = await openTensors(openFolder(folder));
  try {
    await readParameters(
      mesh.config, reader, async (name, values) => mesh.write(name, await values()), folder);
  } finally {
    await reader.close();
  }
}

/** A step that compiles nothing any more is traced: the second one, or the last. */
async function tracedStep(run: TrainingRun, onTrace: TrainingOptions["onTrace"]): Promise<RunStep> {
  const { trainer, recipe } = run;
  if (!onTrace || run.done !== Math.min(1, recipe.steps - 1 - trainer.steps + run.done)) return run.step();
  let step: RunStep;
  const trace = await trainer.trace(async () => {
    step = await run.step();
  });
  onTrace(trace, run, trainer.steps);
  return step!;
}

/** Bytes on the devices of ranks, each device counted once. */
export function bytesOn(devices: readonly Device[], which: "liveBytes" | "peakBytes"): number {
  return [...new Set(devices)].reduce((sum, { pool }) => sum + pool[which], 0);
}

function writeCurve(
  file: string, metricsFile: string, baselines: NgramBaselines, toBits: (loss: number) => number,
): void {
  const records = readMetrics(metricsFile);
  const points = (key: string) => records.flatMap((record) => {
    const loss = record[key];
    return typeof loss === "number" ? [{ step: record.step, loss: toBits(loss) }] : [];
  });
  writeFileSync(file, lossCurve({
    train: points("loss"), validation: points("val_loss"), title: "Loss", yLabel: "bits per byte",
    references: (["unigram", "bigram", "trigram"] as const)
      .map((label) => ({ label, value: baselines[label].bitsPerByte })),
  }));
}

/** @throws FormatError when a corpus has fewer tokens than one row of the recipe. */
function checkCorpusSize(tokens: number, recipe: Recipe): void {
  if (tokens <= recipe.seqlen) {
    throw new FormatError(
      `The training data holds ${tokens} tokens, but one row of the recipe needs ${recipe.seqlen + 1}.`);
  }
}
