/** The numbers of a training run, with defaults that suit the tiny presets. */
import { choosePrecision, type PrecisionChoice } from "../precision/plan.ts";
import type { TrainedFormat } from "../models/parameters.ts";
import { makeMoETraining, type MoETraining } from "../nn/moe_training.ts";
import { parseOffload } from "../nn/offload.ts";
import { parseRecompute } from "../nn/recompute.ts";
import { MOMENT_DTYPES, type MomentFormat } from "../ops/adamw.ts";
import { UsageError } from "../tensor/errors.ts";
import { makeSchedule, type Schedule } from "./schedule.ts";

/** How correction biases move; see TrainerOptions. */
export const BIAS_UPDATES = ["sign", "quantile"] as const;
export type BiasUpdate = (typeof BIAS_UPDATES)[number];

export interface Recipe {
  /** Optimiser updates. */
  readonly steps: number;
  readonly seed: number;
  /** Rows per micro-batch, positions per row, micro-batches per update. */
  readonly batch: number;
  readonly seqlen: number;
  readonly accumulate: number;
  /** Whether every scored token counts alike, instead of every micro-batch. */
  readonly per_token: boolean;
  /** Peak learning rate, and its share that is left at the end. */
  readonly lr: number;
  readonly min_lr: number;
  readonly schedule: "wsd" | "cosine" | "constant";
  /** Steps of warm-up, and of the final decay (WSD). */
  readonly warmup: number;
  readonly decay: number;
  readonly beta1: number;
  readonly beta2: number;
  readonly eps: number;
  readonly weight_decay: number;
  /** Largest global gradient norm. */
  readonly clip: number;
  readonly mtp_depths: number;
  readonly mtp_scale: number;
  /** Coefficients of what routers add to the loss: see BalanceCoefficients in src/nn/balance.ts. */
  readonly aux_coeff: number;
  readonly aux_loss: number;
  readonly global_aux_loss: number;
  readonly z_loss: number;
  readonly bias_rate: number;
  readonly bias_update: BiasUpdate;
  /** Rows of an expert over its even share, 0: as many as there are; and what of MoETraining goes with it. */
  readonly capacity_factor: number;
  readonly drop_policy: MoETraining["drop_policy"];
  readonly pad_to_capacity: boolean;
  readonly align: number;
  readonly router_jitter: number;
  readonly router_dtype: MoETraining["router_dtype"];
  readonly routing: MoETraining["routing"];
  readonly forced_balance: boolean;
  readonly weighing: MoETraining["weighing"];
  /** How matrices are stored, and whether those in bf16 have f32 masters; the rest is f32. */
  readonly weights: TrainedFormat;
  readonly master: "f32" | "none";
  /** How both moments of AdamW are stored. */
  readonly moments: MomentFormat;
  /** The run ends when so many steps in a row have a loss or a gradient norm that is not finite. */
  readonly max_skipped: number;
  /** What runs a second time instead of being kept for the backward pass: see `parseRecompute`. */
  readonly recompute: string;
  /** What lies in host memory instead of on the device: see `parseOffload`. */
  readonly offload: string;
  /** Formats of products, and the ingredients left out: names of src/precision/recipes.ts, by commas. */
  readonly precision: string;
  readonly without: string;
  /** Steps between evaluations; 0: only at the end. Rows of validation text per evaluation; 0: all. */
  readonly eval_every: number;
  readonly eval_rows: number;
}

/** What does not pass within a few batches lies in the weights. */
export const MAX_SKIPPED = 5;

/**
 * Published values where the model family has them (Nemotron 3 reports: AdamW 0.9/0.95, decay 0.1,
 * clip 1, MTP 0.3).
 */
export const RECIPE: Recipe = {
  steps: 300, seed: 0, batch: 8, seqlen: 128, accumulate: 1, per_token: false,
  lr: 4e-3, min_lr: 4e-5, schedule: "wsd", warmup: 20, decay: 100,
  beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: 1,
  mtp_depths: 1, mtp_scale: 0.3, aux_coeff: 1e-4, aux_loss: 0, global_aux_loss: 0, z_loss: 0,
  bias_rate: 1e-3, bias_update: "sign", capacity_factor: 0, drop_policy: "probs", pad_to_capacity: false,
  align: 1, router_jitter: 0, router_dtype: "f32", routing: "topk", forced_balance: false, weighing: "output",
  max_skipped: MAX_SKIPPED,
  recompute: "off", offload: "off", precision: "f32", without: "", eval_every: 0, eval_rows: 0,
  weights: "f32", master: "f32", moments: "f32",
};

/**
 * Fills in a recipe. Without given lengths the warm-up is a fifteenth and the decay a third of the run.
 * @throws UsageError for a value out of range.
 */
export function makeRecipe(given: { readonly [key in keyof Recipe]?: Recipe[key] | undefined }): Recipe {
  const set =
    Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined)) as Partial<Recipe>;
  const steps = set.steps ?? RECIPE.steps;
  const recipe: Recipe = {
    ...RECIPE,
    warmup: Math.min(Math.ceil(steps / 15), 200),
    decay: Math.floor(steps / 3),
    min_lr: (set.lr ?? RECIPE.lr) / 100,
    ...set,
    recompute: recomputeOf(set),
  };
  const ranges: [keyof Recipe, boolean, string][] = [
    ["steps", Number.isInteger(recipe.steps) && recipe.steps >= 1, "a whole number of at least 1"],
    ["batch", Number.isInteger(recipe.batch) && recipe.batch >= 1, "a whole number of at least 1"],
    ["seqlen", Number.isInteger(recipe.seqlen) && recipe.seqlen >= 2, "a whole number of at least 2"],
    [
      "accumulate", Number.isInteger(recipe.accumulate) && recipe.accumulate >= 1,
      "a whole number of at least 1",
    ],
    [
      "mtp_depths",
      Number.isInteger(recipe.mtp_depths) && recipe.mtp_depths >= 0 && recipe.mtp_depths < recipe.seqlen - 1,
      "a whole number from 0 to the row's length minus 2",
    ],
    [
      "max_skipped", Number.isInteger(recipe.max_skipped) && recipe.max_skipped >= 1,
      "a whole number of at least 1",
    ],
    ["weights", ["f32", "bf16"].includes(recipe.weights), "f32 or bf16"],
    ["master", ["f32", "none"].includes(recipe.master), "f32 or none"],
    [
      "master", recipe.weights === "bf16" || recipe.master === "f32",
      "f32 for weights that are f32 and thus their own masters",
    ],
    ["moments", Object.hasOwn(MOMENT_DTYPES, recipe.moments), Object.keys(MOMENT_DTYPES).join(", ")],
    ["weight_decay", recipe.weight_decay >= 0, "at least 0"],
    ...(["aux_coeff", "aux_loss", "global_aux_loss", "z_loss"] as const).map(
      (name): [keyof Recipe, boolean, string] => [name, recipe[name] >= 0, "at least 0"]),
    ["clip", recipe.clip > 0, "above 0"],
    ["bias_update", BIAS_UPDATES.includes(recipe.bias_update), BIAS_UPDATES.join(" or ")],
  ];
  for (const [name, holds, expected] of ranges) {
    if (!holds) throw new UsageError(`The recipe's ${name} must be ${expected}, found ${recipe[name]}.`);
  }
  moeTrainingOf(recipe);
  parseRecompute(recipe.recompute);
  parseOffload(recipe.offload);
  scheduleOf(recipe);
  return { ...recipe, without: precisionOf(recipe).without.join() };
}

/** Runs of older versions recomputed all layers or none, and say so by a flag. */
function recomputeOf({ recompute = RECIPE.recompute }: { recompute?: string | boolean }): string {
  return typeof recompute === "string" ? recompute : recompute ? "full" : "off";
}

/** What MoE layers do other than the model says. @throws UsageError for a value out of range */
export function moeTrainingOf(recipe: Recipe): MoETraining {
  const { capacity_factor, drop_policy, pad_to_capacity, align, router_dtype, routing, weighing } = recipe;
  return makeMoETraining({
    capacity_factor: capacity_factor === 0 ? Infinity : capacity_factor, drop_policy, pad_to_capacity, align,
    jitter: recipe.router_jitter, router_dtype, routing, weighing, forced_balance: recipe.forced_balance,
  });
}

/** The formats of products. @throws UsageError for a name that is not known */
export function precisionOf({ precision, without }: Pick<Recipe, "precision" | "without">): PrecisionChoice {
  return choosePrecision(precision, without.split(",").map((name) => name.trim()).filter(
    (name) => name !== ""));
}

/** The learning rate by step. */
export function scheduleOf(recipe: Recipe): Schedule {
  const { lr: peak, min_lr: min, warmup, decay, steps } = recipe;
  switch (recipe.schedule) {
    case "wsd": return makeSchedule({ kind: "wsd", peak, min, warmup, decay, steps, shape: "linear" });
    case "cosine": return makeSchedule({ kind: "cosine", peak, min, warmup, steps });
    case "constant": return makeSchedule({ kind: "constant", peak, warmup });
  }
}
