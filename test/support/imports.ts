import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseSync, Visitor } from "rolldown/utils";

export const ROOT = fileURLToPath(new URL("../../", import.meta.url));

/** One import of a file: static, re-exported, dynamic, or a type taken with `import("...")`. */
export interface ImportEdge {
  /** Path from the repository's root, with forward slashes. */
  readonly from: string;
  /** The specifier as written; a relative one becomes a path from the repository's root. */
  readonly to: string;
  /** When the imported file is loaded: with this one, when a call asks for it, or never (types only). */
  readonly load: "static" | "dynamic" | "never";
}

export interface SourceFile {
  readonly path: string;
  readonly imports: readonly ImportEdge[];
  /** Every identifier and property name of the file. */
  readonly names: ReadonlySet<string>;
}

/** Reads imports and names from the text of one TypeScript file. */
export function parseSource(path: string, text: string): SourceFile {
  const { program, errors } = parseSync(path, text);
  if (errors[0]) throw new SyntaxError(`${path}: ${errors[0].message}`);
  const imports: ImportEdge[] = [];
  const names = new Set<string>();
  const add = (to: string, load: ImportEdge["load"]) => {
    imports.push({ from: path, to: fromRoot(path, to), load });
  };
  new Visitor({
    ImportDeclaration(node) {
      const types = node.specifiers.length > 0
        && node.specifiers.every((each) => each.type === "ImportSpecifier" && each.importKind === "type");
      add(node.source.value, node.importKind === "type" || types ? "never" : "static");
    },
    ExportNamedDeclaration(node) {
      if (node.source) add(node.source.value, node.exportKind === "type" ? "never" : "static");
    },
    ExportAllDeclaration(node) {
      add(node.source.value, node.exportKind === "type" ? "never" : "static");
    },
    ImportExpression(node) {
      const { source } = node;
      if (source.type === "Literal" && typeof source.value === "string") add(source.value, "dynamic");
    },
    TSImportType(node) {
      add(node.source.value, "never");
    },
    Identifier(node) {
      names.add(node.name);
    },
  }).visit(program);
  return { path, imports, names };
}

/** Parses every `.ts` file below a folder of the repository. */
export function parseFolder(folder: string): SourceFile[] {
  return readdirSync(join(ROOT, folder), { recursive: true, encoding: "utf8" })
    .filter((name) => name.endsWith(".ts") && !name.endsWith(".d.ts") && !name.includes("node_modules"))
    .map((name) => `${folder}/${name.replaceAll("\\", "/")}`)
    .sort()
    .map((path) => parseSource(path, readFileSync(join(ROOT, path), "utf8")));
}

function fromRoot(from: string, to: string): string {
  if (!to.startsWith(".")) return to;
  const path = new URL(to, new URL(from, "file:///")).pathname.slice(1);
  return path.split("?")[0] ?? path;
}
