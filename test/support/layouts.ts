/** A small hybrid model trained under a layout, to be compared with one rank. */
import { expect } from "vitest";
import {
  firstGradients, LAYOUT_MODEL, LAYOUT_SIZES, layoutBatches, startLayout, worstOf,
} from "../../src/cli/bench/layouts.ts";
import { apart, predictedOf, totalOf } from "../../src/cli/bench/memory.ts";
import type { NemotronHConfig } from "../../src/models/config.ts";
import type { Device } from "../../src/tensor/device.ts";
import type { Batch } from "../../src/train/packing.ts";
import type { SentCollective } from "../../src/train/trace.ts";
import type { HeldBytes, StepMetrics, TrainerOptions } from "../../src/train/trainer.ts";

export { LAYOUT_MODEL as SMALL, LAYOUT_SIZES as SIZES, layoutBatches as smallBatches, startLayout, worstOf };

export interface Outcome {
  readonly steps: readonly StepMetrics[];
  /** A tenth of every gradient in the first step, by parameter. */
  readonly gradients: ReadonlyMap<string, Float32Array>;
  readonly parameters: ReadonlyMap<string, Float32Array>;
  /** Moments of all ranks. */
  readonly optimizerBytes: number;
  /** Of one rank at every place in the pipeline, as they were and as the formulas have them. */
  readonly held: readonly HeldBytes[];
  readonly predicted: readonly HeldBytes[];
  /** What ranks send to each other in a step. */
  readonly collectives: readonly SentCollective[];
  /** The most that a step's own tensors take at one time, of all ranks. */
  readonly peak: number;
}

/** Trains under a layout, on one device or on that of every rank. */
export async function trainSmall(
  on: Device | readonly Device[], layout: string, batches: readonly Batch[],
  { steps = 1, config = LAYOUT_MODEL, after, ...options }:
  Partial<Omit<TrainerOptions, "steps" | "accumulate">> & {
    steps?: number; config?: NemotronHConfig; bucket_size?: number; after?: (step: number) => void;
  } = {},
): Promise<Outcome> {
  const run = startLayout(on, layout, batches.length, config, options);
  try {
    const metrics: StepMetrics[] = [];
    let gradients = new Map<string, Float32Array>();
    for (let step = 0; step < steps; step++) {
      metrics.push(await run.trainer.step(batches));
      after?.(step);
      if (step === 0) gradients = await firstGradients(run);
    }
    const parameters = new Map<string, Float32Array>();
    for (const name of run.mesh.parameters.keys()) parameters.set(name, await run.mesh.read(name));
    const states = run.trainer.optimizers.flatMap(({ state }) => state);
    const optimizerBytes = states.reduce((sum, { byteLength }) => sum + byteLength, 0);
    return {
      steps: metrics, gradients, parameters, optimizerBytes, held: run.trainer.heldByRank!,
      predicted: predictedOf(run, config), peak: run.trainer.memory!.live,
      collectives: run.trainer.collectives,
    };
  } finally {
    run.dispose();
  }
}

/** Parameters, gradients and moments as predicted, activations and the sum within a tenth. */
export function checkPredicted({ held, predicted }: Pick<Outcome, "held" | "predicted">): void {
  held.forEach((found, rank) => {
    const { activations, ...rest } = predicted[rank]!;
    expect(rest).toMatchObject({
      parameters: found.parameters, gradients: found.gradients, optimizer: found.optimizer,
    });
    expect(apart(activations, found.activations)).toBeLessThan(0.1);
    expect(apart(totalOf(predicted[rank]!), totalOf(found))).toBeLessThan(0.1);
  });
}
