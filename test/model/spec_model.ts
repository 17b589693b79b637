/**
 * A model of 15,640 parameters, `ME*-M` with a latent mixture of experts and two layers of prediction head,
 * whose weights and tokens come from a small generator: vectors for it can be computed, and were, by programs
 * that share nothing with this one.
 */
import { listParameters } from "../../src/models/checkpoint_names.ts";
import { NemotronH } from "../../src/models/nemotron_h.ts";
import { preset } from "../../src/models/presets.ts";
import type { Device } from "../../src/tensor/device.ts";
import { sizeOf } from "../../src/tensor/ndarray.ts";
import { unscoped } from "../../src/tensor/scope.ts";

export const config = preset("unit");

type Pair = readonly [number, number];

/** Scale and offset of the values of a mixer's tensors, in the order in which they are drawn. */
const MIXERS: Readonly<Record<string, Readonly<Record<string, Pair>>>> = {
  M: {
    "in_proj.weight": [0.3, 0], "conv1d.weight": [0.5, 0], "conv1d.bias": [0.1, 0], dt_bias: [0.5, -1],
    A_log: [0.5, 0.5], D: [0.2, 1], "norm.weight": [0.1, 1], "out_proj.weight": [0.2, 0],
  },
  E: {
    "gate.weight": [0.4, 0], "gate.e_score_correction_bias": [0.1, 0], "fc1_latent_proj.weight": [0.4, 0],
    "fc2_latent_proj.weight": [0.4, 0], experts: [0.5, 0], "shared_experts.up_proj.weight": [0.3, 0],
    "shared_experts.down_proj.weight": [0.3, 0],
  },
  "*": {
    "q_proj.weight": [0.4, 0], "k_proj.weight": [0.4, 0], "v_proj.weight": [0.4, 0],
    "o_proj.weight": [0.2, 0],
  },
  "-": { "up_proj.weight": [0.3, 0], "down_proj.weight": [0.3, 0] },
};

function draw(): { values: Map<string, Float64Array>; tokens: Int32Array } {
  let state = 1234;
  const uniform = () => {
    state = (Math.imul(1664525, state) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
  const values = new Map(listParameters(config).map(
    ({ name, shape }) => [name, new Float64Array(sizeOf(shape))]));
  const fill = (name: string, [scale, offset]: Pair, part?: Pair) => {
    const all = values.get(name)!;
    const size = part ? all.length / part[1] : all.length;
    const from = part ? part[0] * size : 0;
    for (let i = from; i < from + size; i++) all[i] = (2 * uniform() - 1) * scale + offset;
  };
  const fillExperts = (name: string, range: Pair) => {
    for (let e = 0; e < 8; e++) {
      for (const matrix of ["up_proj", "down_proj"]) fill(`${name}.${matrix}`, range, [e, 8]);
    }
  };
  const layers = (prefix: string, pattern: string, before: (i: number) => void) => {
    [...pattern].forEach((letter, i) => {
      before(i);
      fill(`${prefix}.${i}.norm.weight`, [0.1, 1]);
      for (const [name, range] of Object.entries(MIXERS[letter]!)) {
        const full = `${prefix}.${i}.mixer.${name}`;
        if (name === "experts") fillExperts(full, range);
        else fill(full, range);
      }
    });
  };
  fill("backbone.embeddings.weight", [1, 0]);
  layers("backbone.layers", config.hybrid_override_pattern, () => {});
  fill("backbone.norm_f.weight", [0.1, 1]);
  fill("lm_head.weight", [0.3, 0]);
  layers("mtp.layers", config.mtp_hybrid_override_pattern, (i) => {
    if (i > 0) return;
    for (const name of ["enorm", "hnorm"]) fill(`mtp.layers.0.${name}.weight`, [0.1, 1]);
    fill("mtp.layers.0.eh_proj.weight", [0.3, 0]);
  });
  fill("mtp.layers.1.final_layernorm.weight", [0.1, 1]);
  return { values, tokens: Int32Array.from({ length: 13 }, () => Math.floor(32 * uniform())) };
}

const drawn = draw();

/** 13 token ids: the first 12 are inputs, the last 12 labels. */
export const tokens = drawn.tokens;

/** The model on a device; its parameters require gradients. */
export function specModel(device: Device): NemotronH {
  const parameters = unscoped(() => listParameters(config).map(({ name, shape, trainable }) => {
    const tensor = device.tensor(Float32Array.from(drawn.values.get(name)!), shape);
    tensor.requiresGrad = trainable;
    return [name, tensor] as const;
  }));
  return new NemotronH(config, new Map(parameters));
}
