/**
 * The suite `precision`: the same small hybrid trained in one format after another, and what that costs in
 * validation loss. A result is a whole run; runs that a file holds already are not repeated.
 */
import { existsSync, readFileSync } from "node:fs";
import type { NemotronHConfig } from "../../models/config.ts";
import { NemotronH } from "../../models/nemotron_h.ts";
import { createParameters } from "../../models/parameters.ts";
import { preset } from "../../models/presets.ts";
import { median } from "../../gpu/measure.ts";
import { RECIPES, type RecipeName } from "../../precision/recipes.ts";
import type { Device } from "../../tensor/device.ts";
import { byteTokenizer } from "../../text/byte_tokenizer.ts";
import { type Document, splitDocuments } from "../../train/data.ts";
import { tokenizeDocuments } from "../../train/packing.ts";
import { makeRecipe } from "../../train/recipe.ts";
import { TrainingRun } from "../../train/run.ts";
import { findConfig } from "../models.ts";
import { readLines } from "./report.ts";

export const PRECISION_SUITE = "precision";
/**
 * Layers of the preset tiny in another order: the last of them stays high, and should not hold all experts.
 */
export const PRECISION_CONFIG = "tiny:ME*-M";
/** Updates of a run: all variants and three seeds take about half an hour of two CPU cores. */
export const PRECISION_STEPS = 200;
/** Validation rows of one evaluation, and evaluations per run. */
const ROWS = 128;
const EVALUATIONS = 10;

export interface Variant {
  readonly name: string;
  readonly precision: RecipeName;
  readonly without: string;
}

/** f32 first: gaps are measured against it. */
export const VARIANTS: readonly Variant[] = [
  ...(["f32", "bf16", "fp8-current", "mxfp8", "nvfp4"] as const).map((precision) =>
    ({ name: precision, precision, without: "" })),
  ...Object.keys(RECIPES.nvfp4.ingredients).map((without) =>
    ({ name: `nvfp4 without ${without}`, precision: "nvfp4" as const, without })),
];

/** One run. */
export interface PrecisionLine {
  readonly suite: typeof PRECISION_SUITE;
  /** VARIANT, seed N */
  readonly case: string;
  readonly variant: string;
  readonly seed: number;
  readonly config: string;
  readonly steps: number;
  readonly batch: number;
  readonly seqlen: number;
  /** Hash of the text and its order. */
  readonly data: string;
  /** Mean cross entropy of the validation rows at the end, nats. */
  readonly val_loss: number;
  /** The same on the way: [updates, nats]. */
  readonly curve: readonly (readonly [step: number, loss: number])[];
  /** Median milliseconds of a step. */
  readonly ms: number;
}

export interface PrecisionOptions {
  readonly config: string;
  readonly documents: readonly Document[];
  readonly seeds: number;
  readonly steps: number;
  /** Parts of variant names; empty: all. */
  readonly cases: readonly string[];
  readonly signal: AbortSignal;
}

export interface PrecisionHooks {
  /** A run that a file holds already. */
  done(
    line: Pick<PrecisionLine, "case" | "config" | "steps" | "batch" | "seqlen" | "data">,
  ): PrecisionLine | null;
  working(name: string): void;
  finished(line: PrecisionLine): void;
}

/** A preset, a file or a folder; PRESET:PATTERN puts other layers into a preset. */
function configOf(name: string): NemotronHConfig {
  const [base, pattern] = name.split(":");
  if (pattern === undefined) return findConfig(name);
  return { ...preset(base!), hybrid_override_pattern: pattern, num_hidden_layers: pattern.length };
}

/** Runs what is missing, seed by seed, and returns the lines of all variants that were asked for. */
export async function benchPrecision(
  device: Device, options: PrecisionOptions, hooks: PrecisionHooks,
): Promise<PrecisionLine[]> {
  const config = configOf(options.config);
  const split = splitDocuments([...options.documents]);
  const tokenizer = byteTokenizer(config.vocab_size);
  const [corpus, validation] = [split.train, split.validation].map(
    (part) => tokenizeDocuments(part, tokenizer)) as
    [ReturnType<typeof tokenizeDocuments>, ReturnType<typeof tokenizeDocuments>];
  const wanted = VARIANTS.filter(({ name }) =>
    name === "f32" || options.cases.length === 0 || options.cases.some((part) => name.includes(part)));
  const lines: PrecisionLine[] = [];
  for (let seed = 0; seed < options.seeds; seed++) {
    for (const { name, precision, without } of wanted) {
      if (options.signal.aborted) return lines;
      const recipe = makeRecipe({
        steps: options.steps, seed, precision, without, eval_rows: ROWS,
      });
      const model = new NemotronH(config, createParameters(device, config, seed));
      const run = new TrainingRun(model, recipe, corpus, validation);
      try {
        const key = {
          case: `${name}, seed ${seed}`, config: options.config, steps: options.steps, batch: recipe.batch,
          seqlen: recipe.seqlen, data: run.packer.fingerprint,
        };
        let line = hooks.done(key);
        if (!line) {
          hooks.working(key.case);
          line = { suite: PRECISION_SUITE, variant: name, seed, ...key, ...await train(run, options) };
          if (options.signal.aborted) return lines;
          hooks.finished(line);
        }
        lines.push(line);
      } finally {
        run.dispose();
        model.dispose();
      }
    }
  }
  return lines;
}

async function train(
  run: TrainingRun, { steps, signal }: PrecisionOptions,
): Promise<Pick<PrecisionLine, "val_loss" | "curve" | "ms">> {
  const curve: [number, number][] = [];
  const times: number[] = [];
  const every = Math.max(1, Math.round(steps / EVALUATIONS));
  for (let step = 1; step <= steps && !signal.aborted; step++) {
    const since = performance.now();
    await run.step();
    times.push(performance.now() - since);
    if (step % every === 0 || step === steps) curve.push([step, (await run.evaluate()).loss]);
  }
  times.sort((a, b) => a - b);
  return { val_loss: curve.at(-1)?.[1] ?? NaN, curve, ms: times.length > 0 ? median(times) : NaN };
}

/** The runs of a file, by what makes them the same. */
export function finishedRuns(file: string | undefined, adapter: string): PrecisionHooks["done"] {
  const lines = file !== undefined && existsSync(file) ? readLines(readFileSync(file, "utf8"), file) : [];
  return (wanted) => {
    const found = lines.findLast((line) => line.suite === PRECISION_SUITE && line.adapter === adapter &&
      Object.entries(wanted).every(([key, value]) => line[key] === value));
    return (found as unknown as PrecisionLine | undefined) ?? null;
  };
}

export interface Gap {
  readonly variant: string;
  readonly seeds: number;
  /** Mean validation loss at the end, nats. */
  readonly val_loss: number;
  /** Mean over the seeds of loss / f32's of the same seed - 1, and the deviation of one seed from it. */
  readonly gap: number;
  readonly spread: number;
  /** The same at the last evaluation before the late switch. */
  readonly gap_before: number;
  /** Median step time to f32's, mean over seeds. */
  readonly time: number;
}

/** Gaps to f32, variant by variant, over the seeds that have both. */
export function gapsOf(lines: readonly PrecisionLine[]): Gap[] {
  const of = (variant: string) => lines.filter((line) => line.variant === variant);
  const base = new Map(of("f32").map((line) => [line.seed, line]));
  const mean = (values: readonly number[]) => values.reduce((a, b) => a + b, 0) / values.length;
  return VARIANTS.flatMap(({ name }) => {
    const pairs = of(name).flatMap((line) => {
      const f32 = base.get(line.seed);
      return f32 ? [{ line, f32 }] : [];
    });
    if (pairs.length === 0) return [];
    const gaps = pairs.map(({ line, f32 }) => line.val_loss / f32.val_loss - 1);
    const gap = mean(gaps);
    const early = pairs.map(({ line, f32 }) => {
      const until = RECIPES.nvfp4.late_switch * line.steps;
      const at = line.curve.findLastIndex(([step]) => step <= until);
      return at < 0 ? NaN : line.curve[at]![1] / f32.curve[at]![1] - 1;
    });
    return [{
      variant: name, seeds: pairs.length, val_loss: mean(pairs.map(({ line }) => line.val_loss)), gap,
      spread: Math.sqrt(gaps.reduce((sum, one) => sum + (one - gap) ** 2, 0) / Math.max(gaps.length - 1, 1)),
      gap_before: mean(early), time: mean(pairs.map(({ line, f32 }) => line.ms / f32.ms)),
    }];
  });
}
