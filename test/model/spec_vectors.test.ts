import { describe, expect, test } from "vitest";
import { Tape } from "../../src/autograd/tape.ts";
import { Generator } from "../../src/infer/engine.ts";
import { evaluate, evaluateIncremental, type EvaluateInputs } from "../../src/models/evaluate.ts";
import { scope } from "../../src/tensor/scope.ts";
import { onEveryAdapter } from "../support/devices.ts";
import { config, specModel, tokens } from "./spec_model.ts";
import * as vectors from "./spec_vectors.ts";

const L = 12;
const V = config.vocab_size;
const D = config.hidden_size;
const inputs: EvaluateInputs = {
  batch: 1, seqlen: L, input_ids: tokens.slice(0, L), labels: tokens.slice(0, L),
};

const sum = (values: Iterable<number>) => [...values].reduce((a, b) => a + b, 0);
const absSum = (values: Iterable<number>) => sum([...values].map(Math.abs));

/** Every value within `allowed` of the expected one. */
function near(what: string, found: ArrayLike<number>, expected: readonly number[], allowed: number): void {
  let worst = 0;
  for (let i = 1; i < expected.length; i++) {
    if (!(Math.abs(found[i]! - expected[i]!) <= Math.abs(found[worst]! - expected[worst]!))) worst = i;
  }
  const [got, wanted] = [found[worst], expected[worst]];
  expect(Math.abs(got! - wanted!), `${what}[${worst}]: ${got}, expected ${wanted}`).toBeLessThan(allowed);
}

/** Row `t` of a (1, seqlen, width) array. */
const row = (values: ArrayLike<number>, t: number, width: number) =>
  Array.from(values).slice(t * width, (t + 1) * width);

test("the generator draws the tokens and the number of weights that were computed with", () => {
  expect([...tokens]).toEqual(vectors.TOKENS);
});

await onEveryAdapter((device) => {
  const model = specModel(device);
  const weightBytes = device.pool.liveBytes;
  const outputs = evaluate(model, inputs, { internals: true });

  describe("vectors", () => {
    test("residual stream after every layer", async () => {
      const found = await outputs;
      vectors.RESIDUALS.forEach(([total, abs, last], i) => {
        const x = found.get(`hidden_states.${i}`)!.data;
        near(`sums after layer ${i - 1}`, [sum(x), absSum(x)], [total, abs], 2e-4);
        near(`last row after layer ${i - 1}`, row(x, 11, D), last, 2e-5);
      });
    });

    test("experts chosen, and their weights", async () => {
      const found = await outputs;
      const index = found.get("router.1.topk_indices")!.data;
      vectors.EXPERTS.forEach((chosen, t) => {
        expect(row(index, t, 3), `t = ${t}`).toEqual([...chosen].map(Number).sort());
      });
      const weights = found.get("router.1.topk_weights")!.data;
      vectors.EXPERT_WEIGHTS.forEach((expected, t) => {
        near(`weights of t = ${t}`, row(weights, t, 3), expected, 5e-6);
      });
    });

    test("logits, and those of both prediction depths", async () => {
      const found = await outputs;
      const logits = found.get("logits")!.data;
      near("logits", row(logits, 0, V), vectors.LOGITS_FIRST, 2e-5);
      near("logits", row(logits, 11, V), vectors.LOGITS_LAST, 2e-5);
      near("sums of logits", [sum(logits), absSum(logits)], vectors.LOGITS_SUMS, 5e-4);
      const rows = vectors.ARGMAX.map((_, t) => row(logits, t, V));
      const largest = rows.map((each) => each.indexOf(Math.max(...each)));
      expect(largest).toEqual(vectors.ARGMAX);
      for (const [name, t, expected] of vectors.MTP_LOGITS) {
        near(`${name} of t = ${t}`, row(found.get(name)!.data, t, V), expected, 2e-5);
      }
    });

    test("states and histories after the last token", async () => {
      const { caches } = await evaluateIncremental(model, inputs, [L]);
      for (const [layer, total, abs, history] of vectors.STATES) {
        const state = caches.get(`cache.${layer}.ssm_state`)!.data;
        near(`state of layer ${layer}`, [sum(state), absSum(state)], [total, abs], 2e-5);
        const window = caches.get(`cache.${layer}.conv_state`)!.data;
        near(`history of layer ${layer}`, [sum(window.filter((_, i) => i % 4 > 0))], [history], 1e-4);
      }
    });

    test("losses and the gradients of all parameters", async () => {
      const targets = (d: number) =>
        Int32Array.from({ length: L }, (_, t) => t < L - d ? tokens[t + 1 + d]! : -100);
      const shifted = (d: number) => Int32Array.from({ length: L }, (_, t) => t + d < L ? tokens[t + d]! : 0);
      const { losses, gradients } = scope(() => {
        const upload = (values: Int32Array) => device.tensor(values, [1, L]);
        const batch = {
          input_ids: upload(shifted(0)), targets: upload(targets(0)), seq_idx: null,
          mtp: [1, 2].map((d) => ({ input_ids: upload(shifted(d)), targets: upload(targets(d)) })),
        };
        const tape = new Tape();
        const loss = tape.run(() => model.loss(batch, { mtp_scale: 0.3 }));
        const found = tape.backward([loss.total], [device.tensor([1], [])]);
        return { losses: [loss.main, ...loss.mtp, loss.total], gradients: found };
      });
      const found = await Promise.all(losses.map((loss) => loss.item()));
      near("losses", found, vectors.LOSSES, 2e-6);
      for (const [name, total, abs, first] of vectors.GRADIENTS) {
        const [, base, expert] = /^(.*?)(?:@(\d))?$/.exec(name)!;
        const gradient = gradients.get(model.parameters.get(base!)!.key)!;
        const all = await gradient.read();
        const size = expert === undefined ? all.length : all.length / 8;
        const part = all.subarray(Number(expert ?? 0) * size, (Number(expert ?? 0) + 1) * size);
        near(name, [sum(part), absSum(part), part[0]!], [total, abs, first], 2e-7 + 2e-6 * abs);
      }
      const experts = model.parameters.get("mtp.layers.1.mixer.experts.up_proj")!;
      const unused = await gradients.get(experts.key)!.read();
      expect(absSum(unused.subarray(3 * 96, 4 * 96)), "an expert without tokens").toBe(0);
      for (const loss of losses) loss.dispose();
      for (const gradient of gradients.values()) gradient.release();
    });

    test("greedy continuation, plain and with one to three drafted tokens", async () => {
      const generator = new Generator(model, 5 + L + 3);
      for (const draft of [0, 1, 2, 3]) {
        const ids: number[] = [];
        const options = { maxTokens: L, draft };
        for await (const id of generator.generate(vectors.PROMPT, options)) ids.push(id);
        expect(ids, `${draft} drafts`).toEqual(vectors.CONTINUATION);
      }
      generator.dispose();
    });
  });

  describe("properties", () => {
    test("every split into prefill and decode gives the logits and the caches of one pass", async () => {
      const whole = (await outputs).get("logits")!.data;
      const { caches: expected } = await evaluateIncremental(model, inputs, [L]);
      for (const pieces of [[], [1], [7], [1, 3, 8], [4, 4, 4], [2, 1, 5], [11]]) {
        const { logits, caches } = await evaluateIncremental(model, inputs, pieces);
        near(`logits of ${pieces}`, logits, Array.from(whole), 2e-5);
        for (const [name, { data }] of expected) {
          near(`${name} of ${pieces}`, caches.get(name)!.data, Array.from(data), 2e-5);
        }
      }
    });

    test("no logit depends on a later token, nor one of depth 1 on a token after the next", async () => {
      const before = await outputs;
      for (const at of [3, 8]) {
        const changed = inputs.input_ids.slice();
        changed[at] = (changed[at]! + 1) % V;
        const after = await evaluate(model, { ...inputs, input_ids: changed });
        const pairs = [["logits", at], ["mtp.logits", at - 1], ["mtp.logits_depth2", at - 2]] as const;
        for (const [name, rows] of pairs) {
          const [old, now] = [before.get(name)!.data, after.get(name)!.data];
          near(name, now, row(old, 0, rows * V), 1e-6);
          expect(row(now, rows, V), `${name} of t = ${rows}`).not.toEqual(row(old, rows, V));
        }
      }
    });

    test("packed documents give the logits and gradients of separate runs", async () => {
      const bounds = Int32Array.from([0, 5, 6, 12]);
      // The first token of a document is not scored.
      const labels = inputs.input_ids.map((id, t) => bounds.includes(t) ? -100 : id);
      const packed = await evaluate(model, { ...inputs, labels, cu_seqlens: bounds }, { grads: true });
      const gradients = new Map<string, Float64Array>();
      const logits: number[] = [];
      for (let d = 0; d + 1 < bounds.length; d++) {
        const [from, to] = [bounds[d]!, bounds[d + 1]!];
        const ids = inputs.input_ids.slice(from, to);
        const document = { batch: 1, seqlen: to - from, input_ids: ids, labels: ids };
        const alone = await evaluate(model, document, { grads: true });
        logits.push(...alone.get("logits")!.data);
        // Each document's loss is a mean over its own labels; 9 labels count in all.
        for (const [name, { data }] of alone) {
          if (!name.startsWith("grad.")) continue;
          const total = gradients.get(name) ?? new Float64Array(data.length);
          data.forEach((value, i) => (total[i]! += value * (to - from - 1) / 9));
          gradients.set(name, total);
        }
      }
      near("logits", packed.get("logits")!.data, logits, 2e-5);
      for (const [name, expected] of gradients) {
        near(name, packed.get(name)!.data, Array.from(expected), 5e-6);
      }
    });

    test("rows of a batch do not see each other", async () => {
      const other = inputs.input_ids.map((id) => (5 * id + 3) % V);
      const both = await evaluate(model, {
        batch: 2, seqlen: L, input_ids: Int32Array.from([...inputs.input_ids, ...other]),
      });
      const alone = await evaluate(model, { batch: 1, seqlen: L, input_ids: other });
      const first = (await outputs).get("logits")!.data;
      near("logits", both.get("logits")!.data, [...first, ...alone.get("logits")!.data], 1e-5);
    });

    test("nothing stays behind but the weights", () => {
      expect(device.pool.liveBytes).toBe(weightBytes);
      model.dispose();
      expect(device.pool.liveBytes).toBe(0);
    });
  });
});
