/** The planner beside published rates: what it predicts for each, and whether the orders agree. */
import { gpuNamed, peakOf } from "./hardware.ts";
import { trainingFlops } from "./model_shape.ts";
import { searchPlans } from "./plan.ts";
import type { Plan, PlanRequest } from "./plan.ts";
import { namedShape, PUBLISHED_RUNS } from "./published.ts";
import type { PublishedRun } from "./published.ts";
import { UsageError } from "../tensor/errors.ts";

export interface Prediction {
  readonly run: PublishedRun;
  /** Null where the planner finds no layout that fits. */
  readonly plan: Plan | null;
  /** Published TFLOPS as a share of the dense peak; null where the run ran out of memory. */
  readonly mfu: number | null;
  /** Predicted over published TFLOPS, less 1; null where either is missing. */
  readonly error: number | null;
  /** Operations per token as counted here over those that published TFLOPS and tokens imply, less 1. */
  readonly flopsError: number | null;
}

/** The search that a published run leaves: what it states is kept, the rest is free. */
export function requestOf(run: PublishedRun): PlanRequest {
  const { layout, microBatch, recompute, method } = run;
  return {
    shape: namedShape(run.model)!, gpus: run.gpus, gpu: gpuNamed(run.gpu), precision: run.precision,
    seqlen: run.seqlen, globalBatch: run.globalBatch, top: 1,
    fixed: {
      ...layout, ...(microBatch === undefined ? {} : { microBatch }),
      ...(recompute === undefined ? {} : { recompute }),
    },
    unfolded: method !== "folded" && method !== "other", fsdp: method.startsWith("fsdp"),
    overlapExchange: run.overlap ?? false,
    // The folding paper exchanges a copy for every expert, the later ones use deduplicating dispatchers.
    deduplicate: method === "other",
  };
}

/** Predicts one published run. */
export function predictRun(run: PublishedRun): Prediction {
  const { gpu, shape } = requestOf(run);
  let plan: Plan | null = null;
  try {
    plan = searchPlans(requestOf(run)).plans[0]!;
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
  }
  const { tflops, tokens } = run;
  return {
    run, plan, mfu: tflops === null ? null : (tflops * 1e12) / peakOf(gpu, run.precision),
    error: plan && tflops !== null ? plan.tflops / tflops - 1 : null,
    flopsError: tokens === undefined || tflops === null ? null
      : trainingFlops(shape, run.seqlen) / ((tflops * 1e12) / tokens) - 1,
  };
}

/** One published order of rates, and whether the predicted rates have it. */
export interface OrderCheck {
  readonly what: string;
  /** The slowest first. */
  readonly published: readonly string[];
  readonly predicted: readonly string[];
  readonly agrees: boolean;
}

/** All comparisons. */
export interface Validation {
  readonly predictions: readonly Prediction[];
  readonly orders: readonly OrderCheck[];
  readonly errors: readonly TableErrors[];
}

export interface TableErrors {
  readonly table: PublishedRun["table"] | "all";
  readonly runs: number;
  /** Of the absolute relative errors. */
  readonly median: number;
  readonly worst: number;
  /** Of the signed ones. */
  readonly mean: number;
}

/** Predicts every published run. Takes some seconds: runs without a layout are searched. */
export function validate(runs: readonly PublishedRun[] = PUBLISHED_RUNS): Validation {
  const predictions = runs.map(predictRun);
  const tables = [...new Set(runs.map(({ table }) => table))];
  return {
    predictions, orders: checkOrders(predictions),
    errors: [...tables, "all" as const].map((table) => errorsOf(predictions, table)),
  };
}

/** The orders that the tables of the folding paper have. */
function checkOrders(predictions: readonly Prediction[]): OrderCheck[] {
  const measured = predictions.filter(({ run, plan }) => run.tflops !== null && plan);
  const of = (table: string, model: string) =>
    measured.filter(({ run }) => run.table === table && run.model === model);
  const models = [...new Set(measured.filter(({ run }) => run.table === "F3").map(({ run }) => run.model))];
  const checks: OrderCheck[] = [];
  const check = (what: string, list: readonly Prediction[], name: (run: PublishedRun) => string): void => {
    if (list.length < 2) return;
    const sorted = (by: (each: Prediction) => number) =>
      list.toSorted((a, b) => by(a) - by(b)).map(({ run }) => name(run));
    const published = sorted(({ run }) => run.tflops!);
    const predicted = sorted(({ plan }) => plan!.tflops);
    checks.push({ what, published, predicted, agrees: published.join() === predicted.join() });
  };
  for (const model of models) {
    check(`methods, ${model}`, of("F3", model).filter(({ run }) => run.precision === "bf16"),
      ({ method }) => method);
    check(`precisions, ${model}`,
      of("F3", model).filter(({ run }) => run.method === "folded"), ({ precision }) => precision);
    for (const method of ["five-way", "folded"] as const) {
      check(`more GPUs, ${model}, ${method}`,
        of("F3 scaling", model).filter(({ run }) => run.method === method), ({ gpus }) => String(gpus));
      check(`longer sequences, ${model}, ${method}`,
        of("F3 context", model).filter(({ run }) => run.method === method), ({ seqlen }) => String(seqlen));
    }
  }
  check("folded runs of all models",
    measured.filter(({ run }) => run.table === "F3" && run.method === "folded" && run.precision === "bf16"),
    ({ model }) => model);
  return checks;
}

function errorsOf(predictions: readonly Prediction[], table: TableErrors["table"]): TableErrors {
  const errors = predictions.filter(({ run }) => table === "all" || run.table === table)
    .flatMap(({ error }) => error === null ? [] : [error]);
  const sizes = errors.map(Math.abs).toSorted((a, b) => a - b);
  return {
    table, runs: errors.length, median: sizes[Math.floor(sizes.length / 2)]!, worst: sizes.at(-1)!,
    mean: errors.reduce((sum, error) => sum + error, 0) / errors.length,
  };
}
