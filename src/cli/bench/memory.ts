/**
 * The suite `memory`: models of several shapes trained under layouts and recomputations, and for every rank
 * the bytes that the formulas of src/parallel/ predict beside those that it had.
 */
import type { NemotronHConfig } from "../../models/config.ts";
import { MOE_TRAINING } from "../../nn/moe_training.ts";
import { parseRecompute, RECOMPUTE_OFF } from "../../nn/recompute.ts";
import { scanArrangement } from "../../ops/ssd_scan.ts";
import { predictHeld } from "../../parallel/held.ts";
import type { StepSizes } from "../../parallel/layout.ts";
import type { Device } from "../../tensor/device.ts";
import type { HeldBytes } from "../../train/trainer.ts";
import { LAYOUT_MODEL, LAYOUT_SIZES, layoutBatches, startLayout } from "./layouts.ts";
import type { Bench } from "./runner.ts";

const SUITE = "memory";
const MICROS = 4;

/** Shapes that have little in common, and the rows and positions of a micro-batch. */
export const MEMORY_MODELS: Readonly<Record<string, {
  readonly config: NemotronHConfig; readonly sizes: Omit<StepSizes, "micro_batches">;
}>> = {
  small: { config: LAYOUT_MODEL, sizes: LAYOUT_SIZES },
  wide: {
    config: {
      ...LAYOUT_MODEL, hybrid_override_pattern: "MM-M*E", num_hidden_layers: 6, vocab_size: 256,
      hidden_size: 64, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 32,
      mamba_num_heads: 8, mamba_head_dim: 16, n_groups: 2, ssm_state_size: 16, chunk_size: 16,
      intermediate_size: 256, n_routed_experts: 16, num_experts_per_tok: 4, moe_intermediate_size: 48,
      moe_latent_size: null, moe_shared_expert_intermediate_size: 128,
    },
    sizes: { batch: 1, seqlen: 96 },
  },
  deep: {
    config: {
      ...LAYOUT_MODEL, hybrid_override_pattern: "*-*-*EM-*EM-", num_hidden_layers: 12, vocab_size: 128,
      hidden_size: 48, num_attention_heads: 6, num_key_value_heads: 2, head_dim: 10,
      mamba_num_heads: 4, mamba_head_dim: 24, n_groups: 4, ssm_state_size: 8, chunk_size: 24,
      intermediate_size: 96, n_routed_experts: 4, num_experts_per_tok: 1, norm_topk_prob: false,
      moe_intermediate_size: 64, moe_latent_size: 24, n_shared_experts: 0,
    },
    sizes: { batch: 3, seqlen: 16 },
  },
};

/** One rank, every axis, experts over ranks, and a grid of experts folded over the rest of eight ranks. */
export const MEMORY_LAYOUTS = [
  "tp=1", "tp=2", "cp=2", "pp=2", "pp=2,vpp=2", "dp=2", "dp=4,ep=4", "tp=2,cp=2,dp=2,ep=4",
] as const;

export const MEMORY_RECOMPUTES = {
  none: "off", selective: "layernorm,moe_act,core_attn,shared_experts", full: "full",
} as const;

/** What the formulas say that the ranks of a run hold. */
export function predictedOf(
  { mesh, trainer: { options } }: Pick<ReturnType<typeof startLayout>, "mesh" | "trainer">,
  config: NemotronHConfig,
): HeldBytes[] {
  const { batch, seqlen, accumulate, aux_coeff, zero = true, moe, recompute = RECOMPUTE_OFF } = options;
  const { layout, devices } = mesh;
  const { tp, cp, dp } = layout;
  return predictHeld(layout, config, { batch, seqlen, micro_batches: accumulate / dp }, {
    mtp_depths: options.mtp_depths, recompute, zero, balanced: aux_coeff > 0,
    weighing: moe?.weighing ?? MOE_TRAINING.weighing,
    scan: scanArrangement(devices[0]!, {
      heads: batch * config.mamba_num_heads / tp / cp, seqlen, headdim: config.mamba_head_dim,
      dstate: config.ssm_state_size, chunk_size: config.chunk_size, training: true,
    }),
  });
}

export interface MemoryCase {
  readonly held: readonly HeldBytes[];
  readonly predicted: readonly HeldBytes[];
  /** Of all ranks' graphs together: the most that was alive at one time in a step. */
  readonly step_bytes: number;
}

/** Trains a step, and says what ranks had and what the formulas say. */
export async function measureMemory(
  device: Device, name: string, text: string, recompute: string,
): Promise<MemoryCase> {
  const { config, sizes } = MEMORY_MODELS[name]!;
  const run = startLayout(device, text, MICROS, config, { ...sizes, recompute: parseRecompute(recompute) });
  try {
    await run.trainer.step(layoutBatches(MICROS, false, sizes));
    const { heldByRank, memory } = run.trainer;
    return { held: heldByRank!, predicted: predictedOf(run, config), step_bytes: memory!.live };
  } finally {
    run.dispose();
  }
}

export function totalOf({ parameters, gradients, optimizer, activations }: HeldBytes): number {
  return parameters + gradients + optimizer + activations;
}

/** How far apart two numbers are, as a share of the second. */
export function apart(predicted: number, found: number): number {
  return Math.abs(predicted / found - 1);
}

export async function benchMemory(bench: Bench): Promise<void> {
  const worst = { total: 0, activations: 0, case: "none" };
  for (const name of Object.keys(MEMORY_MODELS)) {
    for (const layout of MEMORY_LAYOUTS) {
      for (const [what, recomputed] of Object.entries(MEMORY_RECOMPUTES)) {
        const label = `${name} ${layout} ${what}`;
        if (!bench.wants(SUITE, label)) continue;
        const { held, predicted, step_bytes } = await measureMemory(bench.device, name, layout, recomputed);
        for (const [rank, found] of held.entries()) {
          const said = predicted[rank]!;
          const off = apart(totalOf(said), totalOf(found));
          const parts = apart(said.activations, found.activations);
          if (off > worst.total) [worst.total, worst.case] = [off, label];
          worst.activations = Math.max(worst.activations, parts);
          const named = (prefix: string, { parameters, gradients, optimizer, activations }: HeldBytes) =>
            Object.fromEntries(Object.entries({ parameters, gradients, optimizer, activations }).map(
              ([part, bytes]) => [`${prefix}_${part}`, bytes]));
          await bench.add({
            suite: SUITE, case: held.length > 1 ? `${label}, stage ${rank}` : label, times: [], unit: "bytes",
            work: totalOf(found),
            details: {
              ...named("predicted", said), ...named("measured", found),
              predicted: totalOf(said), ratio: totalOf(said) / totalOf(found),
              activations_ratio: said.activations / found.activations, step_bytes,
            },
            remark: `of a rank; predicted ${percent(totalOf(said) / totalOf(found))}, activations ` +
              percent(said.activations / found.activations),
          });
        }
      }
    }
  }
  await bench.add({
    suite: SUITE, case: "worst", times: [], unit: "bytes", work: 0,
    details: { off: worst.total, activations_off: worst.activations, of: worst.case },
    remark: `${percent(worst.total)} off (${worst.case}); activations ${percent(worst.activations)}`,
  });
}

function percent(share: number): string {
  return `${(100 * share).toFixed(2)} %`;
}
