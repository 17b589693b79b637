/** What a rank of a layout has in memory when Krait trains on it, in f32: predicted. */
import type { NemotronHConfig } from "../models/config.ts";
import { endsChain } from "../models/part.ts";
import { holdingsOf } from "./holdings.ts";
import type { ActivationPart, KraitKernels } from "./kept.ts";
import type { Layout, StepSizes } from "./layout.ts";
import { type Again, type Chunk, F32_TRAINING, rankMemory } from "./memory.ts";
import { shapeOf } from "./model_shape.ts";
import { placeOfStage, stagesOf } from "./stages.ts";

export interface HeldOptions extends KraitKernels {
  /** Prediction depths that are trained. */
  readonly mtp_depths: number;
  /** Whether ranks that share parameters divide the optimiser's state among them. */
  readonly zero: boolean;
  readonly recompute: Again;
}

/** Bytes of one rank. */
export interface PredictedBytes {
  readonly parameters: number;
  readonly gradients: number;
  readonly optimizer: number;
  /** What forward passes leave for backward passes, the most at one time. */
  readonly activations: number;
  readonly parts: Readonly<Record<ActivationPart, number>>;
}

/** The bytes of one rank at every place in the pipeline. */
export function predictHeld(
  layout: Layout, config: NemotronHConfig, sizes: StepSizes,
  { mtp_depths, zero, recompute, ...krait }: HeldOptions,
): PredictedBytes[] {
  const whole = shapeOf(config, "");
  const shape = { ...whole, mtpDepths: config.num_nextn_predict_layers > 0 ? mtp_depths : 0 };
  const stages = Array.from({ length: layout.pp }, (): Chunk[] => []);
  stagesOf(layout, config).forEach((part, i) => {
    const { from, to, embedding, head, mtp } = part;
    stages[placeOfStage(layout, i).rank]!.push({
      layers: whole.layers.slice(from, to), embedding, head, mtp, norm: endsChain(part, config),
    });
  });
  const options = { widths: F32_TRAINING, recompute, krait, sharding: "none", stages } as const;
  const { tp, cp, dp, edp } = layout;
  return holdingsOf(layout, config).map(({ dense, experts, untrained, whole: alike, shared }, rank) => {
    // What ranks of tp hold alike they divide among them too; without sp its gradients are alike as well.
    const copies = layout.sp ? tp : 1;
    const cut = dense - alike - shared + alike / copies + (shared * config.num_key_value_heads) / tp;
    const owned = zero ? cut / (dp * cp) + experts / edp : dense + experts;
    const { activations: parts } = rankMemory(shape, layout, sizes, options, rank);
    return {
      parameters: 4 * (dense + experts + untrained), gradients: 4 * (dense + experts), optimizer: 8 * owned,
      activations: Object.values(parts).reduce((sum, bytes) => sum + bytes, 0), parts,
    };
  });
}
