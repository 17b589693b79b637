import { describe, expect, test } from "vitest";
import { parseConfig } from "../../src/models/config.ts";
import type { NemotronHConfig } from "../../src/models/config.ts";
import { preset } from "../../src/models/presets.ts";
import { checkLayout, formatLayout, parseLayout, worldOf } from "../../src/parallel/layout.ts";
import type { StepSizes } from "../../src/parallel/layout.ts";
import { UsageError } from "../../src/tensor/errors.ts";

const SIZES: StepSizes = { batch: 1, seqlen: 48, micro_batches: 4 };
/** Sizes that 2, 3 and 4 divide, key heads and groups less often than the rest. */
const config = (keys: Readonly<Record<string, unknown>> = {}): NemotronHConfig => parseConfig({
  hybrid_override_pattern: "ME*-M", vocab_size: 24, hidden_size: 24, num_attention_heads: 12,
  num_key_value_heads: 6, head_dim: 8, mamba_num_heads: 24, mamba_head_dim: 4, ssm_state_size: 4,
  n_groups: 12, chunk_size: 4, intermediate_size: 24, n_routed_experts: 12, num_experts_per_tok: 2,
  moe_intermediate_size: 24, moe_shared_expert_intermediate_size: 24, ...keys,
});
const only = (pattern: string, keys: Readonly<Record<string, unknown>> = {}) =>
  config({ hybrid_override_pattern: pattern, ...keys });

describe("a layout's text", () => {
  test("axes that are missing are 1, edp follows, sp is on under tp", () => {
    expect(parseLayout("tp=2,cp=2,pp=2,dp=1,ep=4,etp=1")).toEqual({
      tp: 2, cp: 2, dp: 1, pp: 2, ep: 4, etp: 1, edp: 1, vpp: 1, micro_batch_group: 2, sp: true,
      cp_kind: "ring", dispatcher: "alltoall", overlap: false, algorithm: "direct", expert_budget: null,
      stages: null,
    });
    expect(parseLayout("")).toMatchObject({ tp: 1, cp: 1, dp: 1, pp: 1, ep: 1, etp: 1, edp: 1, sp: false });
    expect(parseLayout("tp=2, sp=off").sp).toBe(false);
    expect(parseLayout("sp=on").sp).toBe(false);
    expect(worldOf(parseLayout("tp=2,cp=3,pp=4,dp=5"))).toBe(120);
  });

  test("a missing dp is what the world leaves", () => {
    expect(parseLayout("tp=2,pp=2", 16)).toMatchObject({ dp: 4, edp: 8 });
    expect(parseLayout("tp=2,pp=2,dp=4,etp=2,ep=2", 16)).toMatchObject({ dp: 4, edp: 2 });
  });

  test.each([
    ["", "tp=1,cp=1,pp=1,dp=1,ep=1,etp=1"],
    [" dp = 2 , tp=2,ep=4 ", "tp=2,cp=1,pp=1,dp=2,ep=4,etp=1"],
    ["tp=2,sp=off,pp=2,vpp=3,group=2", "tp=2,cp=1,pp=2,dp=1,ep=1,etp=1,vpp=3,sp=off"],
    ["pp=2,vpp=2,group=4,cp_kind=allgather,dispatch=flex,algorithm=ring",
      "tp=1,cp=1,pp=2,dp=1,ep=1,etp=1,vpp=2,group=4,cp_kind=allgather,dispatch=flex,algorithm=ring"],
    ["dp=2,ep=2,overlap=on", "tp=1,cp=1,pp=1,dp=2,ep=2,etp=1,overlap=on"],
    ["dp=2,ep=2,overlap=off", "tp=1,cp=1,pp=1,dp=2,ep=2,etp=1"],
    ["pp=2,stages=Et,|t,L", "tp=1,cp=1,pp=2,dp=1,ep=1,etp=1,stages=Et,|t,L"],
    [" stages = EtL", "tp=1,cp=1,pp=1,dp=1,ep=1,etp=1,stages=EtL"],
    ["pp=2, stages=M-|M*", "tp=1,cp=1,pp=2,dp=1,ep=1,etp=1,stages=M-|M*"],
  ])("%s is printed as %s and read back", (text, printed) => {
    const layout = parseLayout(text);
    expect(formatLayout(layout)).toBe(printed);
    expect(parseLayout(printed)).toEqual(layout);
  });

  test.each([
    ["tp", "A layout is key=value with commas between, found \"tp\"."],
    ["tp=2,", "key=value with commas between, found \"\"."],
    ["tp=", "tp must be a whole number from 1 to 65536, found \"\"."],
    ["tp=0", "tp must be a whole number from 1 to 65536, found \"0\"."],
    ["cp=-1", "cp must be a whole number from 1 to 65536, found \"-1\"."],
    ["dp=1.5", "dp must be a whole number from 1 to 65536, found \"1.5\"."],
    ["pp=two", "pp must be a whole number from 1 to 65536, found \"two\"."],
    ["ep=9999999", "ep must be a whole number from 1 to 65536, found \"9999999\"."],
    ["xp=2", "A layout's key must be one of tp, cp, pp, dp, ep, etp, vpp, group, sp, cp_kind, dispatch, "],
    ["edp=2", "edp is tp * cp * dp / (etp * ep): expected no edp, found one."],
    ["tp=2,tp=2", "The layout's tp must stand once, found it twice."],
    ["sp=yes", "sp must be one of on, off, found \"yes\"."],
    ["cp_kind=p2p", "cp_kind must be one of ring, allgather, alltoall, hierarchical, found \"p2p\"."],
    ["dispatch=deepep", "dispatch must be one of alltoall, allgather, flex, found \"deepep\"."],
    ["algorithm=tree", "algorithm must be one of direct, ring, found \"tree\"."],
    ["tp=2,ep=4",
      "\"etp * ep divides tp * cp * dp, the ranks of a stage\": expected a divisor of 2, found 1 * 4."],
    ["dp=6,ep=4", "expected a divisor of 6, found 1 * 4."],
    ["group=2", "\"group needs interleaving\": expected vpp above 1, found group=2 with vpp=1."],
    ["vpp=2", "\"interleaving needs a pipeline\": expected pp above 1, found pp=1 with vpp=2."],
    ["pp=4,vpp=2,group=3", "has at least pp micro-batches\": expected group >= 4, found 3."],
    ["tp=2,dispatch=allgather",
      "\"etp is tp under the allgather dispatcher\": expected etp=2, or dispatch=alltoall or flex, found"],
    ["dp=2,overlap=on", "\"overlap needs experts on several ranks\": expected ep above 1, found ep=1."],
    ["dp=2,ep=2,dispatch=allgather,overlap=on",
      "\"overlap is for tokens that travel\": expected dispatch=alltoall or flex, found dispatch=allgather."],
    ["pp=2,dp=2,ep=2,overlap=on",
      "\"paired passes need interleaving or one stage\": expected vpp above 1, found vpp=1 with pp=2."],
    ["stages=EtL,pp=2", "\"EtL,pp=2\" cannot be read: expected E, t, m, L, |, or a repetition of them"],
    ["pp=2,stages=Mx", "\"a pattern has known letters\": expected M*-EGD+, | and /, found \"x\" in \"Mx\"."],
    ["pp=3,stages=M|M", "\"there are pp * vpp stages\": expected 3 * 1, found 2."],
    ["tp=2000,dp=2000", "\"a world has limits\": expected at most 65536 ranks, found 2000 * 1 * 1 * 2000."],
  ])("%s is refused", (text, message) => {
    expect(() => parseLayout(text)).toThrow(UsageError);
    expect(() => parseLayout(text)).toThrow(message);
  });

  test("a layout has the ranks that there are", () => {
    expect(() => parseLayout("tp=2,dp=2", 8)).toThrow(
      "\"tp * cp * pp * dp is the world\": expected 8 ranks, found 2 * 1 * 1 * 2.");
    expect(() => parseLayout("tp=3", 8)).toThrow(
      "\"tp * cp * pp divides the world\": expected a divisor of 8, found 3.");
    expect(() => parseLayout("tp=16", 8)).toThrow("expected a divisor of 8, found 16.");
  });
});

describe("a model on a layout", () => {
  test.each([
    ["tp=2,cp=2,pp=2,dp=1,ep=4,etp=1"], ["tp=12"], ["tp=3,ep=3"], ["tp=6,cp_kind=alltoall,cp=2,ep=12"],
    ["pp=2,vpp=2"], ["cp=12,cp_kind=alltoall,ep=4,etp=3"], ["dp=7"], ["tp=2,etp=2,dispatch=allgather"],
  ])("%s passes", (text) => {
    expect(() => checkLayout(parseLayout(text), config(), { ...SIZES, seqlen: 144 })).not.toThrow();
  });

  test.each<[string, NemotronHConfig, string]>([
    ["tp=5", only("-"),
      "\"tp divides the vocabulary\": expected vocab_size in multiples of tp = 5, found 24."],
    ["tp=8", only("M", { mamba_num_heads: 12 }),
      "\"tp divides the Mamba heads\": expected mamba_num_heads in"],
    ["tp=8", only("M"),
      "\"tp divides the Mamba groups\": expected n_groups in multiples of tp = 8, found 12."],
    ["tp=2,cp=8", only("M"),
      "\"cp divides the Mamba heads of a rank\": expected mamba_num_heads / tp in multiples "
      + "of cp = 8, found 12."],
    ["tp=2,cp=4", only("M"),
      "\"cp and the Mamba groups of a rank divide each other\": expected n_groups / tp to be "
      + "a multiple or divisor of cp = 4, found 6."],
    ["tp=8", only("*"),
      "\"tp divides the query heads\": expected num_attention_heads in multiples of tp = 8"],
    ["tp=4", only("*"),
      "\"tp and the key-value heads divide each other\": expected num_key_value_heads to be a "
      + "multiple or divisor of tp = 4, found 6."],
    ["cp=8,cp_kind=alltoall", only("*"), "\"cp divides the query heads of a rank under cp_kind=alltoall\""],
    ["cp=4,cp_kind=alltoall", only("*"), "\"cp and the key-value heads of a rank divide each other\""],
    ["tp=8", only("-", { intermediate_size: 12 }), "\"tp divides the MLP\": expected intermediate_size in"],
    ["dp=5,ep=5", only("E"),
      "\"ep divides the experts\": expected n_routed_experts in multiples of ep = 5, found 12"],
    ["dp=5,etp=5", only("E"),
      "\"etp divides the experts' width\": expected moe_intermediate_size in multiples of"],
    ["tp=8", only("E", { moe_shared_expert_intermediate_size: 12 }), "\"tp divides the shared expert\""],
    ["tp=2,sp=off", only("E"), "\"tp > 1 with experts needs sp\": expected sp=on, found sp=off with tp=2."],
    ["dp=5,ep=5", only("-", { mtp_hybrid_override_pattern: "E", num_nextn_predict_layers: 1 }),
      "\"ep divides the experts\""],
    ["pp=3,vpp=2", config(),
      "each of the pp * vpp stages has a layer\": expected at most 5 stages, found 6."],
  ])("%s is refused", (text, model, message) => {
    expect(() => checkLayout(parseLayout(text), model, SIZES)).toThrow(message);
    expect(() => checkLayout(parseLayout(text), model, SIZES)).toThrow(UsageError);
  });

  test.each<[string, Partial<StepSizes>, string]>([
    ["", { batch: 0 }, "\"batch is a count\": expected a whole number above 0, found 0."],
    ["", { seqlen: 1.5 }, "\"seqlen is a count\""],
    ["", { micro_batches: -1 }, "\"micro_batches is a count\""],
    ["cp=2", { seqlen: 6 },
      "\"2 * cp divides the sequence\": expected seqlen in multiples of 2 * cp = 4, found 6."],
    ["tp=3,cp=2", { seqlen: 8 },
      "\"cp * tp divides the sequence under sp\": expected seqlen in multiples of"],
    ["pp=2,vpp=2,group=3", { micro_batches: 2 },
      "has at most all micro-batches\": expected group <= 2, found 3."],
    ["pp=2,vpp=2,group=3", { micro_batches: 7 },
      "\"the last interleaved group has at least pp micro-batches\": expected micro_batches mod 3 to be 0 or "
      + "at least 2, found 7 mod 3 = 1."],
  ])("%s with %o is refused", (text, sizes, message) => {
    expect(() => checkLayout(parseLayout(text), config(), { ...SIZES, ...sizes })).toThrow(message);
  });

  test("what is no matter of the step or the model passes", () => {
    expect(() => checkLayout(parseLayout("tp=3"), only("*", { num_attention_heads: 6 }), SIZES))
      .not.toThrow();
    expect(() => checkLayout(parseLayout("tp=2,sp=off"), only("*-M"), { ...SIZES, seqlen: 5 })).not.toThrow();
    expect(() => checkLayout(parseLayout("pp=2,vpp=2,group=3"), config(), { ...SIZES, micro_batches: 8 }))
      .not.toThrow();
    expect(() => checkLayout(parseLayout("tp=2,ep=8,dp=4"), preset("toy-moe"), { ...SIZES, seqlen: 128 }))
      .not.toThrow();
  });
});
