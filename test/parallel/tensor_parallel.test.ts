/** Tensor and sequence parallel layers: the same model on several ranks of one device. */
import { afterAll, describe, expect, test } from "vitest";
import { Tape } from "../../src/autograd/tape.ts";
import { listParameters } from "../../src/models/checkpoint_names.ts";
import { type NemotronHConfig, parseConfig } from "../../src/models/config.ts";
import type { TrainingBatch } from "../../src/models/nemotron_h.ts";
import { parseLayout } from "../../src/parallel/layout.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { scope } from "../../src/tensor/scope.ts";
import { localsOf } from "../../src/tensor/sharded.ts";
import { Draw } from "../ops/suite.ts";
import { testAdapters } from "../support/adapters.ts";
import { differenceNorm, norm, shardedModel, wholeGradients } from "../support/parallel.ts";

const COMMON = {
  vocab_size: 48, hidden_size: 32, num_attention_heads: 8, num_key_value_heads: 2, head_dim: 4,
  mamba_num_heads: 8, mamba_head_dim: 4, ssm_state_size: 4, n_groups: 4, chunk_size: 8, conv_kernel: 4,
  intermediate_size: 32, n_routed_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 16,
  moe_shared_expert_intermediate_size: 16, norm_topk_prob: true,
};
/** Attention and experts; every kind of layer, with biases, latent experts and a prediction block. */
const CONFIGS: Readonly<Record<string, NemotronHConfig>> = {
  attention: parseConfig({ ...COMMON, hybrid_override_pattern: "*E*E" }),
  hybrid: parseConfig({
    ...COMMON, hybrid_override_pattern: "M*E-", moe_latent_size: 16, num_nextn_predict_layers: 1,
    mtp_hybrid_override_pattern: "*E", use_bias: true, attention_bias: true, mlp_bias: true,
  }),
  dense: parseConfig({
    ...COMMON, hybrid_override_pattern: "M*-", num_nextn_predict_layers: 1, mtp_hybrid_override_pattern: "*",
    use_bias: true, attention_bias: true, mlp_bias: true,
  }),
};
const [B, L] = [2, 16];

function valuesOf(config: NemotronHConfig): Map<string, Float32Array> {
  const r = new Draw(5);
  return new Map(listParameters(config).map(({ name, shape, kind }) => {
    const scale = kind === "bias" || kind === "norm" || kind === "ssm" ? 0.3 : 1.5 / Math.sqrt(shape.at(-1)!);
    const offset = kind === "norm" ? 1 : 0;
    const drawn = r.normal([...shape], scale).data;
    return [name, Float32Array.from(drawn, (value) => value + offset)];
  }));
}

for (const handle of await testAdapters()) {
  describe(handle.info.id, async () => {
    const device = await openDevice({ adapter: handle });
    afterAll(() => device.destroy());

    /** Rows of two documents, some positions without a target. */
    function batchOf(config: NemotronHConfig): TrainingBatch {
      const r = new Draw(7);
      const ids = () => {
        const drawn = r.integers([B, L], 0, config.vocab_size).data;
        return device.tensor(Int32Array.from(drawn), [B, L]);
      };
      const targets = () => {
        const drawn = r.integers([B, L], 0, config.vocab_size).data;
        return device.tensor(Int32Array.from(drawn, (id, i) => (i % 5 === 3 ? -100 : id)), [B, L]);
      };
      const depths = config.num_nextn_predict_layers > 0 ? [0, 1] : [];
      return {
        input_ids: ids(), targets: targets(),
        mtp: depths.map(() => ({ input_ids: ids(), targets: targets() })),
        seq_idx: device.tensor(Int32Array.from({ length: B * L }, (_, i) => (i % L < 5 ? 0 : 1)), [B, L]),
      };
    }

    const options = (config: NemotronHConfig) => ({
      mtp_scale: 0.3,
      ...config.hybrid_override_pattern.includes("E")
        ? { balance: { seq_aux: 0.02, aux: 0.01, global_aux: 0, z: 1e-3 } } : {},
    });

    interface Outcome {
      readonly scalars: number[];
      readonly gradients: Map<string, Float32Array>;
    }

    async function outcome(
      config: NemotronHConfig, text: string, more: { recompute?: boolean; label_smoothing?: number } = {},
    ): Promise<Outcome> {
      const before = device.pool.liveBytes;
      const layout = parseLayout(text);
      const model = shardedModel(device, config, layout, valuesOf(config));
      const tape = new Tape();
      const [scalars, gradients] = scope(() => {
        const loss = tape.run(() => model.loss(batchOf(config), { ...options(config), ...more }));
        const totals = localsOf(loss.total);
        const ones = totals.map(() => device.tensor([1], []));
        const found = tape.backward(totals, ones);
        return [[loss.total, loss.main, ...loss.mtp, ...loss.aux ? [loss.aux] : []], found] as const;
      });
      const numbers: number[] = [];
      for (const scalar of scalars) {
        const all: number[] = [];
        for (const local of localsOf(scalar)) all.push(await local.item());
        expect(new Set(all).size, "ranks agree").toBe(1);
        numbers.push(all[0]!);
        scalar.release();
      }
      const whole = await wholeGradients(model, layout, gradients);
      for (const gradient of gradients.values()) gradient.release();
      model.dispose();
      expect(device.pool.liveBytes).toBe(before);
      return { scalars: numbers, gradients: whole };
    }

    function expectSame(found: Outcome, expected: Outcome): void {
      found.scalars.forEach((value, i) => {
        expect(Math.abs(value / expected.scalars[i]! - 1), `scalar ${i}`).toBeLessThan(1e-6);
      });
      expect([...found.gradients.keys()]).toEqual([...expected.gradients.keys()]);
      for (const [name, gradient] of found.gradients) {
        // Scores do not change when all keys are shifted alike: that gradient is nothing but rounding.
        const unit = expected.gradients.get(name.replace("k_proj.bias", "v_proj.bias"))!;
        const error = differenceNorm(gradient, expected.gradients.get(name)!) / norm(unit);
        expect(error, name).toBeLessThan(1e-5);
      }
    }

    const alone = new Map<string, Promise<Outcome>>();
    const expected = (name: string) => {
      if (!alone.has(name)) alone.set(name, outcome(CONFIGS[name]!, "tp=1"));
      return alone.get(name)!;
    };

    test.each([
      ["attention", "tp=2"], ["attention", "tp=4"], ["hybrid", "tp=2"], ["hybrid", "tp=4"],
      ["dense", "tp=2,sp=off"], ["dense", "tp=4,sp=off"],
    ])("%s under %s has the loss and the gradients of one rank", async (name, text) => {
      expectSame(await outcome(CONFIGS[name]!, text), await expected(name));
    });
  });
}
