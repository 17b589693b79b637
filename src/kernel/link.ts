/**
 * Makes one WGSL module out of a kernel file: chooses what `@if(...)` and `@else` guard, and brings in what
 * `import package::lib::file::name;` asks for. The spelling is that of WESL; nothing is renamed.
 */
import { ShaderError } from "../gpu/errors.ts";

export interface LinkOptions {
  /** Conditions that hold, such as "subgroups", "f16" or one that the file invents. */
  conditions?: readonly string[];
  /** Overrides to turn into constants, for tools that cannot evaluate overrides. */
  constants?: Readonly<Record<string, number>>;
}

export interface Linked {
  readonly code: string;
  /** For each line of `code`: where it was written. */
  readonly origin: readonly { file: string; line: number }[];
}

type Source = (name: string) => string | undefined;

/** Conditions that need an `enable` line, and what it enables. */
const FEATURES: Readonly<Record<string, string>> = {
  f16: "f16", subgroups: "subgroups", subgroup_matrix: "chromium_experimental_subgroup_matrix",
};

/** Every condition that the kernel and what it imports mention, sorted. */
export function conditionsOf(name: string, source: Source): string[] {
  const found = new Set<string>();
  const seen = new Set<string>();
  const visit = (file: string) => {
    if (seen.has(file)) return;
    seen.add(file);
    const text = stripComments(source(file) ?? "");
    for (const match of text.matchAll(/@(?:if|elif)\(\s*([^)]*)\)/g)) {
      for (const word of match[1]!.matchAll(/[A-Za-z_]\w*/g)) found.add(word[0]);
    }
    for (const { file: imported } of importsOf(text)) visit(imported);
  };
  visit(name);
  return [...found].sort();
}

/**
 * Links a kernel.
 * @throws ShaderError for a missing file or declaration, or an unfinished condition.
 */
export function link(name: string, source: Source, options: LinkOptions = {}): Linked {
  const conditions = new Set(options.conditions ?? []);
  const lines: string[] = [];
  const origin: { file: string; line: number }[] = [];
  const push = (text: string, file: string, line: number) => {
    text.split("\n").forEach((part, i) => {
      lines.push(part);
      origin.push({ file, line: line + i });
    });
  };
  for (const [condition, feature] of Object.entries(FEATURES)) {
    if (conditions.has(condition)) push(`enable ${feature};`, "(linker)", 0);
  }

  const emitted = new Set<string>();
  const modules = new Map<string, string>();
  const load = (file: string): string => {
    const known = modules.get(file);
    if (known !== undefined) return known;
    const text = source(file);
    if (text === undefined) {
      throw new ShaderError(`Shader ${file}.wgsl, needed by ${name}.wgsl, does not exist.`);
    }
    const chosen = applyConditions(stripComments(text), conditions, file);
    modules.set(file, chosen);
    return chosen;
  };
  // Imported declarations come before the kernel, each once, with the declarations of the same file they use.
  const bring = (file: string, wanted: string, from: string) => {
    const key = `${file}::${wanted}`;
    if (emitted.has(key)) return;
    emitted.add(key);
    const text = load(file);
    const declarations = declarationsOf(text);
    const declaration = declarations.get(wanted);
    if (!declaration) {
      throw new ShaderError(`${from}.wgsl imports ${wanted} from ${file}.wgsl, which does not declare it.`);
    }
    const words = new Set(declaration.text.match(/[A-Za-z_]\w*/g));
    for (const { file: other, name: what } of importsOf(text)) if (words.has(what)) bring(other, what, file);
    for (const other of declarations.keys()) {
      if (other !== wanted && words.has(other)) bring(file, other, file);
    }
    push(declaration.text, file, declaration.line);
  };
  const text = load(name);
  for (const { file, name: what } of importsOf(text)) bring(file, what, name);
  push(text.replace(/^[ \t]*import\b[^;]*;/gm, (statement) => statement.replace(/[^\n]/g, "")), name, 1);

  let code = lines.join("\n");
  for (const [constant, value] of Object.entries(options.constants ?? {})) {
    const pattern = new RegExp(`override\\s+${constant}\\s*(:\\s*(\\w+))?\\s*(=[^;]*)?;`);
    code = code.replace(pattern, (_, __, type: string | undefined) =>
      `const ${constant}${type ? `: ${type}` : ""} = ` +
      `${type === "f32" ? floatLiteral(value) : String(value)};`);
  }
  return { code, origin };
}

function floatLiteral(value: number): string {
  const text = String(value);
  return /[.e]/.test(text) ? text : `${text}.0`;
}

/** Replaces comments by blanks, so that lines keep their numbers. */
function stripComments(text: string): string {
  return text.replace(/\/\/[^\n]*|\/\*[\s\S]*?\*\//g, (comment) => comment.replace(/[^\n]/g, " "));
}

function importsOf(text: string): { file: string; name: string }[] {
  const imports: { file: string; name: string }[] = [];
  for (const match of text.matchAll(/^[ \t]*import\s+package::([\w:]+?)(?:::\{([^}]*)\}|::(\w+))\s*;/gm)) {
    const file = match[1]!.replaceAll("::", "/");
    const names = match[2] === undefined
      ? [match[3]!]
      : match[2].split(",").map((n) => n.trim()).filter(Boolean);
    for (const name of names) imports.push({ file, name });
  }
  return imports;
}

/** Module-scope declarations by name. */
function declarationsOf(text: string): Map<string, { text: string; line: number }> {
  const found = new Map<string, { text: string; line: number }>();
  let at = 0;
  while (at < text.length) {
    const rest = text.slice(at);
    const start = at + (rest.match(/^\s*/)?.[0].length ?? 0);
    if (start >= text.length) break;
    const end = itemEnd(text, start);
    const item = text.slice(start, end);
    const name = item.match(/\b(?:fn|struct|alias|const|override)\s+(\w+)|\bvar(?:\s*<[^>]*>)?\s+(\w+)/);
    const found_ = name?.[1] ?? name?.[2];
    if (found_ && !item.startsWith("import")) {
      found.set(found_, { text: item, line: text.slice(0, start).split("\n").length });
    }
    at = end;
  }
  return found;
}

/** End of the declaration or statement that begins at `start`: past its `;` or its closing brace. */
function itemEnd(text: string, start: number): number {
  let depth = 0;
  let paren = 0;
  for (let i = start; i < text.length; i++) {
    const c = text[i];
    if (c === "(" || c === "[") paren++;
    else if (c === ")" || c === "]") paren--;
    else if (c === "{") depth++;
    else if (c === "}") {
      depth--;
      if (depth === 0) {
        const rest = text.slice(i + 1).match(/^\s*(else\b|;)/);
        if (rest?.[1] === "else") continue; // an `if` statement goes on
        return rest?.[1] === ";" ? i + 1 + rest[0].length : i + 1;
      }
      if (depth < 0) return i;
    } else if (c === ";" && depth === 0 && paren === 0) return i + 1;
  }
  return text.length;
}

function applyConditions(text: string, conditions: ReadonlySet<string>, file: string): string {
  const blank = (part: string) => part.replace(/[^\n]/g, " ");
  let out = "";
  let at = 0;
  let taken: boolean | null = null; // whether a branch of the running @if chain was chosen
  const marker = /@(if|elif)\(\s*([^)]*(?:\([^)]*\)[^)]*)*)\)|@else\b/g;
  for (let match = marker.exec(text); match; match = marker.exec(text)) {
    const between = text.slice(at, match.index);
    if (match[1] === "if") taken = false;
    else if (taken === null || between.trim() !== "") {
      throw new ShaderError(`${file}.wgsl has ${match[0]} without an @if before it.`);
    }
    const holds: boolean = match[1] === undefined ? !taken : !taken && evaluate(match[2]!, conditions, file);
    const start = marker.lastIndex;
    const end = itemEnd(text, start + (text.slice(start).match(/^\s*/)?.[0].length ?? 0));
    out += between + blank(match[0]);
    const item = text.slice(start, end);
    out += holds ? applyConditions(item, conditions, file) : blank(item);
    taken = taken || holds;
    at = end;
    marker.lastIndex = end;
  }
  return out + text.slice(at);
}

/** Evaluates `a && !b || c`, with `!` binding tightest and no parentheses. */
function evaluate(expression: string, conditions: ReadonlySet<string>, file: string): boolean {
  return expression.split("||").some((any) => any.split("&&").every((term) => {
    const word = term.trim().match(/^(!*)\s*([A-Za-z_]\w*)$/);
    if (!word) {
      throw new ShaderError(`${file}.wgsl has a condition that cannot be read: @if(${expression.trim()}).`);
    }
    const value = word[2] === "true" || (word[2] !== "false" && conditions.has(word[2]!));
    return word[1]!.length % 2 === 1 ? !value : value;
  }));
}
