/**
 * Compiles every kernel under every set of conditions with Dawn's null backend, which validates like a real
 * one and runs nothing. No other test may use it: a kernel that never runs passes every numeric test.
 */
import { afterAll, describe, expect, test } from "vitest";
import { create } from "webgpu";
import { shaderSource, shaderNames } from "../../src/kernel/sources.node.ts";
import { link } from "../../src/kernel/link.ts";
import { manifest } from "../../src/kernel/manifest.ts";
import { conditionSets, kernelNames } from "../../src/kernel/reflect.ts";

interface KernelShape {
  readonly bindings: Readonly<Record<string, { binding: number; access: "read" | "read_write" }>>;
  readonly entries: Readonly<Record<string, readonly string[]>>;
}

const FEATURES = [
  "shader-f16", "subgroups", "chromium-experimental-subgroup-matrix",
] as unknown as GPUFeatureName[];
const COMPUTE = 4;

const instance = create(["backend=null", "enable-dawn-features=allow_unsafe_apis"]);
const adapter = await instance.requestAdapter();
if (!adapter) throw new Error("Dawn's null backend offers no adapter.");
// Default limits: a kernel that needs more does not run everywhere.
const device = await adapter.requestDevice({ requiredFeatures: FEATURES });
const uncaptured: string[] = [];
device.addEventListener("uncapturederror", (event) => {
  uncaptured.push((event as GPUUncapturedErrorEvent).error.message);
});

afterAll(() => {
  device.destroy();
  // An instance that nothing refers to takes its devices with it.
  expect(instance.wgslLanguageFeatures).toBeDefined();
  expect(uncaptured).toEqual([]);
});

/** What Dawn says about a kernel under some conditions, errors and warnings alike; empty when all is well. */
async function complaints(kernel: string, conditions: readonly string[]): Promise<string[]> {
  const { code, origin } = link(kernel, shaderSource, { conditions });
  device.pushErrorScope("validation");
  const module = device.createShaderModule({ code });
  const { messages } = await module.getCompilationInfo();
  const found = messages.map(({ type, message, lineNum }) => {
    const { file, line } = origin[lineNum - 1] ?? { file: kernel, line: lineNum };
    return `${file}.wgsl:${line}: ${type}: ${message}`;
  });
  const refused = await device.popErrorScope();
  if (refused) return found.length > 0 ? found : [refused.message];
  const { bindings, entries } = (manifest as Readonly<Record<string, KernelShape>>)[kernel]!;
  for (const [entryPoint, used] of Object.entries(entries)) {
    if (!new RegExp(`\\bfn\\s+${entryPoint}\\b`).test(code)) continue; // left out under these conditions
    const layout = device.createPipelineLayout({
      bindGroupLayouts: [
        device.createBindGroupLayout({
          entries: used.filter((name) => name !== "params").map((name) => ({
            binding: bindings[name]!.binding, visibility: COMPUTE,
            buffer: { type: bindings[name]!.access === "read" ? "read-only-storage" : "storage" },
          })),
        }),
        device.createBindGroupLayout({
          entries: [{ binding: 0, visibility: COMPUTE, buffer: { type: "uniform" } }],
        }),
      ],
    });
    try {
      await device.createComputePipelineAsync({ layout, compute: { module, entryPoint } });
    } catch (error) {
      found.push(`${kernel}.wgsl (${entryPoint}): ${error instanceof Error ? error.message : String(error)}`);
    }
  }
  return found;
}

/** Sets in which conditions matter together, beside those of `conditionSets`. */
const TOGETHER: Readonly<Record<string, readonly string[][]>> = {
  "matmul/matmul_matrix": [[], ["a_along_k"], ["b_along_k"], ["a_along_k", "b_along_k"]].flatMap((layout) =>
    [["f16"], ["f16", "large"], ["m8", "n8", "k8"], ["f16", "m8", "k8"], ["f16", "n8"]].map((sizes) =>
      ["subgroup_matrix", ...layout, ...sizes])),
};

describe("every kernel compiles at default limits without an error or a warning", () => {
  for (const kernel of kernelNames()) {
    test(kernel, async () => {
      for (const conditions of [...conditionSets(kernel), ...TOGETHER[kernel] ?? []]) {
        const found = await complaints(kernel, conditions);
        expect(found, `conditions: ${conditions.join(", ") || "none"}`).toEqual([]);
      }
    });
  }
});

test("an error and a warning are noticed", async () => {
  const says = async (code: string) =>
    (await device.createShaderModule({ code }).getCompilationInfo()).messages.map(({ type }) => type);
  device.pushErrorScope("validation");
  expect(await says("fn f() -> u32 { return 1.5; }")).toEqual(["error"]);
  expect(await device.popErrorScope()).not.toBeNull();
  expect(await says("fn f() -> u32 { return 1u; return 2u; }")).toEqual(["warning"]);
});

test("shader files keep the rules of docs/adding-an-op.md", () => {
  const offences = shaderNames().flatMap((name) => {
    const text = shaderSource(name)!;
    const lines = text.replace(/\n$/, "").split("\n");
    const long = lines.flatMap((line, i) => line.length > 110 ? [{ at: i + 1, columns: line.length }] : []);
    return [
      ...(/^\/\/ \S/.test(text) ? [] : [`${name}.wgsl does not begin with a comment on what it computes`]),
      ...(lines.length < 250 ? [] : [`${name}.wgsl has ${lines.length} lines, fewer than 250 are allowed`]),
      ...long.map(({ at, columns }) => `${name}.wgsl:${at} has ${columns} columns, 110 are allowed`),
    ];
  });
  expect(offences).toEqual([]);
});
