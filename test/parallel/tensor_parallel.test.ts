/** Tensor and sequence parallel layers: the same model on several ranks of one device. */
import { afterAll, describe, expect, test, vi } from "vitest";
import { Tape } from "../../src/autograd/tape.ts";
import { listParameters } from "../../src/models/checkpoint_names.ts";
import { type NemotronHConfig, parseConfig } from "../../src/models/config.ts";
import {
  type Loss, type LossOptions, NemotronH, trainingContext, type TrainingBatch,
} from "../../src/models/nemotron_h.ts";
import { parametersOf, type Part } from "../../src/models/part.ts";
import { parseRecompute } from "../../src/nn/recompute.ts";
import { vocabularyCrossEntropy } from "../../src/nn/tensor_parallel.ts";
import { add } from "../../src/ops/elementwise.ts";
import { watchOps } from "../../src/ops/op.ts";
import { type Layout, parseLayout } from "../../src/parallel/layout.ts";
import { divisionOf } from "../../src/parallel/model.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { sizeOf } from "../../src/tensor/ndarray.ts";
import { scope } from "../../src/tensor/scope.ts";
import { localsOf } from "../../src/tensor/sharded.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { Draw } from "../ops/suite.ts";
import { testAdapters } from "../support/adapters.ts";
import {
  differenceNorm, norm, onRanks, shardedModel, wholeGradients,
} from "../support/parallel.ts";

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
  "one key head": parseConfig({ ...COMMON, hybrid_override_pattern: "*", num_key_value_heads: 1 }),
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

    /** What a run must agree on; `compute` gives what is minimised first, then further scalars. */
    async function outcomeOf(
      layout: Layout, models: readonly NemotronH[], compute: () => Tensor[],
    ): Promise<Outcome> {
      const tape = new Tape();
      const [scalars, gradients] = scope(() => {
        const all = tape.run(compute);
        const totals = localsOf(all[0]!);
        return [all, tape.backward(totals, totals.map(() => device.tensor([1], [])))] as const;
      });
      const numbers: number[] = [];
      for (const scalar of scalars) {
        const all: number[] = [];
        for (const local of localsOf(scalar)) all.push(await local.item());
        expect(new Set(all).size, "ranks agree").toBe(1);
        numbers.push(all[0]!);
      }
      for (const scalar of new Set(scalars)) scalar.release();
      const whole = new Map<string, Float32Array>();
      for (const model of models) {
        for (const [name, gradient] of await wholeGradients(model, layout, gradients)) {
          const copy = whole.get(name); // two parts may have the embedding table
          whole.set(name, copy ? gradient.map((value, i) => value + copy[i]!) : gradient);
        }
        model.dispose();
      }
      for (const gradient of gradients.values()) gradient.release();
      return { scalars: numbers, gradients: whole };
    }

    const scalarsOf = ({ total, main, mtp, aux }: Loss) => [total, main, ...mtp, ...aux ? [aux] : []];

    async function outcome(
      config: NemotronHConfig, text: string, more: Partial<LossOptions> = {},
    ): Promise<Outcome> {
      const before = device.pool.liveBytes;
      const layout = parseLayout(text);
      const model = shardedModel(device, config, layout, valuesOf(config));
      const result = await outcomeOf(layout, [model], () =>
        scalarsOf(model.loss(batchOf(config), { ...options(config), ...more })));
      expect(device.pool.liveBytes).toBe(before);
      return result;
    }

    function expectSame(found: Outcome, expected: Outcome): void {
      expect(found.scalars.length).toBe(expected.scalars.length);
      found.scalars.forEach((value, i) => {
        expect(Math.abs(value / expected.scalars[i]! - 1), `scalar ${i}`).toBeLessThan(1e-6);
      });
      expect([...found.gradients.keys()].sort()).toEqual([...expected.gradients.keys()].sort());
      for (const [name, gradient] of found.gradients) {
        // Scores do not change when all keys are shifted alike: that gradient is nothing but rounding.
        const unit = expected.gradients.get(name.replace("k_proj.bias", "v_proj.bias"))!;
        const error = differenceNorm(gradient, expected.gradients.get(name)!) / norm(unit);
        expect(error, name).toBeLessThan(1e-5);
      }
    }

    const alone = new Map<string, Promise<Outcome>>();
    const expected = (name: string, more: Partial<LossOptions> = {}) => {
      const key = name + JSON.stringify(more);
      if (!alone.has(key)) alone.set(key, outcome(CONFIGS[name]!, "tp=1", more));
      return alone.get(key)!;
    };

    test.each<[string, string, Partial<LossOptions>?]>([
      ["attention", "tp=2"], ["attention", "tp=4"], ["hybrid", "tp=2"], ["hybrid", "tp=4,algorithm=ring"],
      ["dense", "tp=2,sp=off"], ["dense", "tp=4,sp=off"], ["one key head", "tp=2"],
      ["hybrid", "tp=2", { label_smoothing: 0.1 }],
    ])("%s under %s has the loss and the gradients of one rank", async (name, text, more) => {
      expectSame(await outcome(CONFIGS[name]!, text, more), await expected(name, more));
    });

    test("blocks that are run again for the backward pass give the same gradients", async () => {
      const found = await outcome(CONFIGS["hybrid"]!, "tp=2", { recompute: parseRecompute("full") });
      expectSame(found, await expected("hybrid"));
    });

    test.each<[string, string, Omit<Part, "embedding" | "head" | "mtp">[], number]>([
      ["three parts, the last with head and prediction", "tp=1", [
        { from: 0, to: 2 }, { from: 2, to: 3 }, { from: 3, to: 4 }], 2],
      ["parts of prediction layers and of head alone", "tp=2", [
        { from: 0, to: 4 }, { from: 4, to: 4 }, { from: 4, to: 4 }], 1],
    ])("%s, under %s, make the whole", async (_name, text, ranges, mtp) => {
      const before = device.pool.liveBytes;
      const config = CONFIGS["hybrid"]!;
      const layout = parseLayout(text);
      const parts = ranges.map((range, i): Part =>
        ({ ...range, embedding: i === 0, mtp: i === mtp, head: i === ranges.length - 1 }));
      const models = parts.map((part) => shardedModel(device, config, layout, valuesOf(config), part));
      const last = models.at(-1)!;
      const found = await outcomeOf(layout, models, () => {
        const batch = batchOf(config);
        const settings = options(config);
        const context = trainingContext(batch, settings);
        let h = models[0]!.embed(batch.input_ids);
        for (const model of models) h = model.run(h, context);
        if (parts.at(-1)!.mtp) return scalarsOf(last.lossFrom(h, batch, settings, context));
        let state = h;
        const backbone = context.routing!.length;
        const states = batch.mtp.map(({ input_ids }) =>
          (state = models[mtp]!.mtpHidden(state, input_ids, context)));
        const routing = context.routing!.map((one, i) =>
          ({ ...one, share: i < backbone ? 1 : 1 / states.length }));
        const aux = last.auxLoss(routing, batch, settings)!;
        const loss = last.lossFrom(h, batch, settings, { ...context, routing: [] }, states);
        return scalarsOf({ ...loss, total: add(loss.total, aux), aux });
      });
      expectSame(found, await expected("hybrid"));
      expect(device.pool.liveBytes).toBe(before);
      const names = parts.flatMap((part) => parametersOf(config, part).map(({ name }) => name));
      const table = "backbone.embeddings.weight";
      expect(names.sort()).toEqual([...listParameters(config).map(({ name }) => name), table].sort());
    });

    test("a part has no more than its weights", () => {
      const config = CONFIGS["hybrid"]!;
      const part = { from: 1, to: 3, embedding: false, head: false, mtp: false };
      const middle = shardedModel(device, config, parseLayout("tp=1"), valuesOf(config), part);
      for (const what of ["embeddings", "norm_f", "lm_head"] as const) {
        expect(() => middle[what]).toThrow(/The part of layers 1 to 3 of a model has no \w+/);
      }
      middle.dispose();
      expect(() => new NemotronH(config, new Map())).toThrow("needs parameters, found none");
    });

    test("under sequence parallel what is normed takes a tp-th of the bytes on every rank", async () => {
      const normed = async (text: string) => {
        const bytes: number[] = [];
        await watchOps((name, args) => {
          if (name === "rms_norm") bytes.push((args[0] as Tensor).byteLength);
        }, () => outcome(CONFIGS["hybrid"]!, text));
        return bytes;
      };
      const whole = await normed("tp=1");
      expect(whole.length).toBe(CONFIGS["hybrid"]!.hybrid_override_pattern.length + 1 + 2 * 5);
      expect(await normed("tp=2")).toEqual(whole.flatMap((bytes) => [bytes / 2, bytes / 2]));
      expect(await normed("tp=2,sp=off")).toEqual(whole.flatMap((bytes) => [bytes, bytes]));
    });

    test.each([0, 0.1])("cross entropy over four parts of a vocabulary, label smoothing %d", async (rate) => {
      const [T, D, V, tp] = [9, 6, 48, 4];
      const r = new Draw(3);
      const [h, weight] = [r.normal([T, D]).data, r.normal([V, D]).data];
      const labels = Int32Array.from(r.integers([T], 0, V).data, (label, t) => (t === 4 ? -100 : label));
      // Against the definition: the target gives its label 1 - rate and every other word its share of rate.
      let sum = 0;
      labels.forEach((label, t) => {
        if (label < 0) return;
        const z = Array.from({ length: V }, (_, v) =>
          Array.from({ length: D }, (_, d) => h[t * D + d]! * weight[v * D + d]!).reduce((a, b) => a + b));
        const lse = Math.log(z.reduce((total, x) => total + Math.exp(x), 0));
        z.forEach((x, v) => {
          sum -= (v === label ? 1 - rate : rate / (V - 1)) * (x - lse);
        });
      });
      const sizes: number[] = [];
      const make = device.empty.bind(device);
      const empty = vi.spyOn(device, "empty").mockImplementation((shape, dtype) => {
        sizes.push(sizeOf(shape));
        return make(shape, dtype);
      });
      try {
        const losses = scope(() => {
          const rows = onRanks((rank) => device.tensor(
            Float32Array.from(weight.subarray((rank * V * D) / tp, ((rank + 1) * V * D) / tp)),
            [V / tp, D]), tp);
          const loss = vocabularyCrossEntropy(
            device.tensor(Float32Array.from(h), [T, D]), rows, device.tensor(labels, [T]),
            divisionOf(parseLayout(`tp=${tp}`)), rate);
          rows.release();
          return localsOf(loss).map((local) => local.retain());
        });
        for (const loss of losses) {
          expect(Math.abs((await loss.item()) / (sum / 8) - 1)).toBeLessThan(1e-6);
          loss.release();
        }
      } finally {
        empty.mockRestore();
      }
      expect(Math.max(...sizes)).toBe((T * V) / tp);
    });
  });
}
