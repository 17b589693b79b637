/** Learning-rate schedules: pure functions of the step, so that resuming needs nothing but the step. */
import { UsageError } from "../tensor/errors.ts";

/** Gives the learning rate of step `step` (0 is the first update). */
export type Schedule = (step: number) => number;

interface Common {
  /** Highest learning rate, > 0. */
  readonly peak: number;
  /** Steps of linear warm-up; the first step has peak/warmup. Default 0. */
  readonly warmup?: number;
}

export interface ConstantOptions extends Common {
  readonly kind: "constant";
}

export interface WsdOptions extends Common {
  readonly kind: "wsd";
  /** Length of the whole run in steps. */
  readonly steps: number;
  /** Steps of the final decay. */
  readonly decay: number;
  /** Learning rate when the run is over, 0 <= min <= peak. Default 0. */
  readonly min?: number;
  /** Shape of the decay. Default "linear". */
  readonly shape?: "linear" | "sqrt";
}

export interface CosineOptions extends Common {
  readonly kind: "cosine";
  /** Length of the whole run in steps. */
  readonly steps: number;
  /** Learning rate when the run is over, 0 <= min <= peak. Default 0. */
  readonly min?: number;
}

export type ScheduleOptions = ConstantOptions | WsdOptions | CosineOptions;

/**
 * Makes the schedule that `options.kind` names.
 *
 * @throws UsageError  when a rate or a number of steps is out of range, or the phases are longer than the run
 */
export function makeSchedule(options: ScheduleOptions): Schedule {
  if (options.kind === "constant") return constantSchedule(options);
  if (options.kind === "wsd") return wsdSchedule(options);
  return cosineSchedule(options);
}

/** lr(s) = peak * min(1, (s + 1) / warmup). */
export function constantSchedule(options: Omit<ConstantOptions, "kind">): Schedule {
  const { peak, warmup = 0 } = options;
  checkRates(peak, 0);
  checkSteps("warmup", warmup, 0);
  return (step) => warmUp(step, warmup, peak) ?? peak;
}

/**
 * Warm-up, stable, decay: peak until `steps - decay`, then peak - (peak - min) * u with u = the finished
 * part of the decay ("linear"), or its square root ("sqrt"). From `steps` on the rate is `min`.
 *
 * Source  Hu et al. 2024 (arXiv 2404.06395); the 1-sqrt decay from Hägele et al. 2024 (arXiv 2405.18392).
 */
export function wsdSchedule(options: Omit<WsdOptions, "kind">): Schedule {
  const { peak, warmup = 0, steps, decay, min = 0, shape = "linear" } = options;
  checkRates(peak, min);
  checkSteps("steps", steps, 1);
  checkSteps("warmup", warmup, 0);
  checkSteps("decay", decay, 0);
  if (shape !== "linear" && shape !== "sqrt") {
    throw new UsageError(`The decay's shape must be "linear" or "sqrt", found "${String(shape)}".`);
  }
  if (warmup + decay > steps) {
    throw new UsageError(
      `Warm-up (${warmup}) and decay (${decay}) together must not exceed the run's ${steps} steps.`,
    );
  }
  return (step) => {
    if (step >= steps) return min;
    const rising = warmUp(step, warmup, peak);
    if (rising !== undefined) return rising;
    const finished = decay === 0 ? 0 : Math.max(0, (step - (steps - decay)) / decay);
    return peak - (peak - min) * (shape === "sqrt" ? Math.sqrt(finished) : finished);
  };
}

/**
 * lr(s) = min + (peak - min) * (1 + cos(pi * u)) / 2 with u = (s - warmup) / (steps - warmup), after a linear
 * warm-up. From `steps` on the rate is `min`.
 */
export function cosineSchedule(options: Omit<CosineOptions, "kind">): Schedule {
  const { peak, warmup = 0, steps, min = 0 } = options;
  checkRates(peak, min);
  checkSteps("steps", steps, 1);
  checkSteps("warmup", warmup, 0);
  if (warmup > steps) {
    throw new UsageError(`The warm-up (${warmup}) must not exceed the run's ${steps} steps.`);
  }
  return (step) => {
    if (step >= steps) return min;
    const rising = warmUp(step, warmup, peak);
    if (rising !== undefined) return rising;
    return peak - ((peak - min) * (1 - Math.cos((Math.PI * (step - warmup)) / (steps - warmup)))) / 2;
  };
}

function warmUp(step: number, warmup: number, peak: number): number | undefined {
  return step < warmup ? (peak * (step + 1)) / warmup : undefined;
}

function checkRates(peak: number, min: number): void {
  if (!(peak > 0 && Number.isFinite(peak))) {
    throw new UsageError(`The schedule's peak learning rate must be a positive number, found ${peak}.`);
  }
  if (!(min >= 0 && min <= peak)) {
    throw new UsageError(`The schedule's minimum must lie between 0 and the peak ${peak}, found ${min}.`);
  }
}

function checkSteps(name: string, value: number, least: number): void {
  if (!Number.isSafeInteger(value) || value < least) {
    throw new UsageError(`The schedule's ${name} must be a whole number >= ${least}, found ${value}.`);
  }
}
