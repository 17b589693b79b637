import { ShaderError } from "../gpu/errors.ts";
import type { Gpu } from "../gpu/gpu.ts";
import type { PipelineHandle } from "../gpu/stream.ts";
import { shaderSource } from "#shaders";
import { type Linked, link } from "./link.ts";

export interface PipelineRequest {
  readonly kernel: string;
  readonly entry: string;
  readonly bindings: readonly { binding: number; access: "read" | "read_write" }[];
  readonly usesParams: boolean;
  readonly constants: Readonly<Record<string, number>>;
  readonly conditions: readonly string[];
}

export interface Pipeline extends PipelineHandle {
  readonly layout: GPUBindGroupLayout;
  readonly layoutKey: string;
}

/** Pipelines of one device, each compiled once and in the background. */
export class PipelineCache {
  readonly #gpu: Gpu;
  readonly #pipelines = new Map<string, Pipeline>();
  readonly #layouts = new Map<string, { group: GPUBindGroupLayout; pipeline: GPUPipelineLayout }>();
  readonly #modules = new Map<string, { module: GPUShaderModule; linked: Linked }>();
  #compiledMs = 0;
  #running = 0;
  #since = 0;

  constructor(gpu: Gpu) {
    this.#gpu = gpu;
  }

  /** Milliseconds during which at least one compile was running, up to now. */
  get compileMs(): number {
    return this.#compiledMs + (this.#running > 0 ? performance.now() - this.#since : 0);
  }

  /** Pipelines compiled or being compiled. */
  get size(): number {
    return this.#pipelines.size;
  }

  get(key: string, request: () => PipelineRequest): Pipeline {
    const known = this.#pipelines.get(key);
    if (known) return known;
    const pipeline = this.#compile(request());
    this.#pipelines.set(key, pipeline);
    return pipeline;
  }

  #compile(request: PipelineRequest): Pipeline {
    const { kernel, entry } = request;
    const layoutKey = request.bindings.map((b) => `${b.binding}${b.access === "read" ? "r" : "w"}`).join() +
      (request.usesParams ? "p" : "");
    let layout = this.#layouts.get(layoutKey);
    if (!layout) {
      const group = this.#gpu.gpuDevice.createBindGroupLayout({
        entries: request.bindings.map(({ binding, access }) => ({
          binding, visibility: 4, buffer: { type: access === "read" ? "read-only-storage" : "storage" },
        })),
      });
      const groups = request.usesParams ? [group, this.#gpu.stream.uniformLayout] : [group];
      layout = { group, pipeline: this.#gpu.gpuDevice.createPipelineLayout({ bindGroupLayouts: groups }) };
      this.#layouts.set(layoutKey, layout);
    }
    const moduleKey = [kernel, ...request.conditions].join("|");
    let compiled = this.#modules.get(moduleKey);
    if (!compiled) {
      const { gpuDevice } = this.#gpu;
      const linked = link(kernel, shaderSource, { conditions: request.conditions });
      gpuDevice.pushErrorScope("validation"); // the pipeline's rejection reports it, with the place
      compiled = { module: gpuDevice.createShaderModule({ code: linked.code, label: moduleKey }), linked };
      gpuDevice.popErrorScope().catch(() => {});
      this.#modules.set(moduleKey, compiled);
    }
    if (this.#running++ === 0) this.#since = performance.now();
    const handle: Pipeline & { pipeline: GPUComputePipeline | null } = {
      label: kernel.endsWith(`/${entry}`) ? kernel : `${kernel}:${entry}`,
      pipeline: null, layout: layout.group, layoutKey,
      ready: this.#gpu.gpuDevice.createComputePipelineAsync({
        label: `${kernel}:${entry}`, layout: layout.pipeline,
        compute: { module: compiled.module, entryPoint: entry, constants: request.constants },
      }).then((pipeline) => {
        handle.pipeline = pipeline;
      }, async (error: unknown) => {
        throw await explain(request, compiled.module, compiled.linked, error);
      }).finally(() => {
        if (--this.#running === 0) this.#compiledMs += performance.now() - this.#since;
      }),
    };
    handle.ready.catch(() => {}); // reported by the stream when the dispatch comes up
    return handle;
  }
}

async function explain(
  request: PipelineRequest, module: GPUShaderModule, linked: Linked, error: unknown,
): Promise<ShaderError> {
  const where =
    `${request.kernel}.wgsl (${request.entry}; ${request.conditions.join(", ") || "no conditions"}; ` +
    `${JSON.stringify(request.constants)})`;
  const lines = linked.code.split("\n");
  const messages = (await module.getCompilationInfo()).messages.filter((m) => m.type === "error").map((m) => {
    const origin = linked.origin[m.lineNum - 1];
    const excerpt = lines.slice(Math.max(0, m.lineNum - 3), m.lineNum + 2)
      .map((line, i) => `    ${Math.max(0, m.lineNum - 3) + i + 1} | ${line}`).join("\n");
    return `  ${origin?.file ?? request.kernel}.wgsl:${origin?.line ?? m.lineNum}: ${m.message}\n${excerpt}`;
  });
  const reason = messages.length > 0
    ? messages.join("\n")
    : `  ${error instanceof Error ? error.message : String(error)}`;
  return new ShaderError(`Shader ${where} did not compile:\n${reason}`);
}

const caches = new WeakMap<Gpu, PipelineCache>();

/** The pipeline cache of a device. */
export function pipelinesOf(gpu: Gpu): PipelineCache {
  let cache = caches.get(gpu);
  if (!cache) {
    cache = new PipelineCache(gpu);
    caches.set(gpu, cache);
  }
  return cache;
}
