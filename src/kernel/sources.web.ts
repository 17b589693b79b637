const files: Record<string, string> =
  import.meta.glob("../../shaders/**/*.wgsl", { query: "?raw", import: "default", eager: true });

const byName = new Map(Object.entries(files).map(
  ([path, text]) => [path.replace(/^.*?shaders\//, "").replace(/\.wgsl$/, ""), text]));

/** WGSL text of a shader by its name, such as "norm/rms_norm"; undefined when there is none. */
export function shaderSource(name: string): string | undefined {
  return byName.get(name);
}

/** Names of all shaders, the shared ones of `lib/` included. */
export function shaderNames(): string[] {
  return [...byName.keys()].sort();
}

/** What `codeHash` in sources.node.ts gave when this page was built or served; see vite.config.ts. */
declare const KRAIT_CODE: string | undefined;

/** A hash of the code that chooses and launches kernels. */
export function codeHash(): string {
  return typeof KRAIT_CODE === "string" ? KRAIT_CODE : "unknown";
}
