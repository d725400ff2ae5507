// Swagger UI on the description of the api; its dark colours are those of a class.

// A part of the description with what its local references stand for; one within itself is kept.
function resolved(part, whole, within = []) {
  if (part === null || typeof part !== "object") return part;
  if (Array.isArray(part)) return part.map((one) => resolved(one, whole, within));
  const { $ref, ...others } = part;
  if (typeof $ref === "string" && !within.includes($ref)) {
    const target = $ref.slice(2).split("/").reduce((node, key) => node[key], whole);
    return resolved({ ...target, ...others }, whole, [...within, $ref]);
  }
  return Object.fromEntries(Object.entries(part).map(([key, one]) => [key, resolved(one, whole, within)]));
}

// Swagger would prepare the whole description for every operation that is opened, which takes one to
// three seconds each time, and once more for a dialogue that asks for a key. The page's session is the
// authorization, and all references are to the same file.
let whole;
const quick = {
  components: { authorizeOperationBtn: () => null },
  statePlugins: {
    spec: {
      wrapSelectors: { securityDefinitions: () => () => null },
      wrapActions: {
        requestResolvedSubtree: (_, { specActions, specSelectors }) => (path) => {
          whole ??= JSON.parse(specSelectors.specStr());
          const part = path.reduce((node, key) => node?.[key], whole);
          if (part && !path.includes("securitySchemes")) specActions.updateResolvedSubtree(path, resolved(part, whole));
        },
      },
    },
  },
};

const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();

SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  // All routes and schemas at once take seconds to draw.
  docExpansion: "none",
  defaultModelsExpandDepth: -1,
  syntaxHighlight: false,
  presets: [SwaggerUIBundle.presets.apis, SwaggerUIBundle.SwaggerUIStandalonePreset].filter(Boolean),
  plugins: [quick],
  layout: "BaseLayout",
  requestInterceptor: (sent) => {
    sent.headers["X-CSRF-Token"] = document.querySelector("meta[name=csrf-token]").content;
    return sent;
  },
});
