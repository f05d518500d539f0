//! From the text of a source file to its awaits, its bodies and the modules it declares.
//!
//! Invariant: it finds every `.await` in the text, inside macros too, except in code that is compiled only for tests
//! and in macros that take code as data.

use proc_macro2::{Delimiter, Group, LineColumn, Span, TokenStream, TokenTree};
use quote::ToTokens;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{Attribute, Block, Expr, ImplItem, Item, ItemMod, Lit, Meta, Stmt, Token, TraitItem, Type, Visibility};

use crate::macros::{self, Contents};
use crate::place::{Await, AwaitKind, Body, Extent, Position, Source};

/// A `mod name;`.
#[derive(Debug)]
pub(crate) struct Declaration {
    pub(crate) name: String,
    /// The inline modules around it, outermost first.
    pub(crate) inside: Vec<String>,
    /// The value of `#[path]`, where there is one.
    pub(crate) path: Option<String>,
    /// The paths that it has under a condition.
    pub(crate) perhaps: Vec<String>,
    /// Whether it may be switched off.
    pub(crate) is_conditional: bool,
}

/// The contents of a file, and the other files that it names.
pub(crate) type Scanned = (Source, Vec<Declaration>);

/// Reads a file. Its awaits are empty when the whole file is compiled for tests only.
pub(crate) fn scan(text: &str) -> syn::Result<Scanned> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let file = syn::parse_file(text)?;
    let mut scanner = Scanner {
        lines: text.split('\n').collect(),
        source: Source::default(),
        declarations: Vec::new(),
        modules: Vec::new(),
        owner: Owner::default(),
        function: Function::default(),
        is_async: false,
    };
    if !file.attrs.iter().any(is_for_tests) {
        scanner.visit_file(&file);
    }
    let Scanner { mut source, declarations, .. } = scanner;
    source.awaits.sort_by_key(|found| found.position);
    source.awaits.dedup_by_key(|found| found.position);
    Ok((source, declarations))
}

/// The `impl` or `trait` around a function.
#[derive(Clone, Default)]
struct Owner {
    name: String,
    /// Its functions are public, with or without `pub`.
    makes_public: bool,
}

#[derive(Clone, Default)]
struct Function {
    name: String,
    public: bool,
}

struct Scanner<'t> {
    lines: Vec<&'t str>,
    source: Source,
    declarations: Vec<Declaration>,
    modules: Vec<String>,
    owner: Owner,
    function: Function,
    is_async: bool,
}

impl Scanner<'_> {
    /// rustc counts columns in bytes from 1, where proc-macro2 counts characters from 0.
    fn position(&self, at: LineColumn) -> Position {
        let line = self.lines.get(at.line.saturating_sub(1)).copied().unwrap_or_default();
        let bytes: usize = line.chars().take(at.column).map(char::len_utf8).sum();
        let small = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Position::new(small(at.line), small(bytes + 1))
    }

    fn extent(&self, start: Span, end: Span) -> Extent {
        Extent { start: self.position(start.start()), end: self.position(end.end()) }
    }

    fn found(&mut self, kind: AwaitKind, at: Span, extent: Extent) {
        let Function { name: function, public } = self.function.clone();
        let position = self.position(at.start());
        self.source.awaits.push(Await { position, kind, function, public, extent });
    }

    /// Looks into a body of code that can await, or cannot.
    fn within(&mut self, is_async: bool, extent: Extent, look: impl FnOnce(&mut Self)) {
        self.source.bodies.push(Body { extent, is_async });
        let around = std::mem::replace(&mut self.is_async, is_async);
        look(self);
        self.is_async = around;
    }

    fn function(&mut self, name: &syn::Ident, vis: &Visibility, is_async: bool, block: &Block) {
        let Owner { name: owner, makes_public } = std::mem::take(&mut self.owner);
        let separator = if owner.is_empty() { "" } else { "::" };
        let public = makes_public || matches!(vis, Visibility::Public(_));
        let here = Function { name: format!("{owner}{separator}{name}"), public };
        let around = std::mem::replace(&mut self.function, here);
        let extent = self.extent(block.span(), block.span());
        self.within(is_async, extent, |this| this.visit_block(block));
        self.function = around;
        self.owner = Owner { name: owner, makes_public };
    }

    /// Whether the node is compiled for tests only; then its extent is kept, because its lines are recorded too.
    fn is_skipped(&mut self, node: &(impl ToTokens + Spanned)) -> bool {
        let tokens = node.to_token_stream();
        let has_attributes =
            matches!(tokens.clone().into_iter().next(), Some(TokenTree::Punct(first)) if first.as_char() == '#');
        let skipped = has_attributes && macros::attributes(tokens).iter().any(is_for_tests);
        if skipped {
            let extent = self.extent(node.span(), node.span());
            self.source.tests.push(extent);
        }
        skipped
    }

    /// Looks at an invocation: `start` is where its path begins, `group` has its tokens.
    fn invocation(&mut self, name: &str, start: Span, end: Span, tokens: TokenStream) {
        if macros::is_quoting(name) {
            return;
        }
        if macros::is_waiting(name) && self.is_async {
            let extent = self.extent(start, end);
            self.found(AwaitKind::Macro(name.to_owned()), start, extent);
        }
        if macros::makes_async(name) {
            let extent = self.extent(start, end);
            self.within(true, extent, |this| this.contents(name, tokens));
        } else {
            self.contents(name, tokens);
        }
    }

    fn contents(&mut self, name: &str, tokens: TokenStream) {
        match macros::read(name, tokens) {
            Contents::Expressions(expressions) => expressions.iter().for_each(|it| self.visit_expr(it)),
            Contents::Statements(statements) => statements.iter().for_each(|it| self.visit_stmt(it)),
            Contents::Arms(arms) => {
                for arm in &arms {
                    arm.pattern.iter().for_each(|it| self.visit_pat(it));
                    arm.expressions.iter().for_each(|it| self.visit_expr(it));
                }
            }
            Contents::Tokens(tokens) => self.tokens(tokens),
        }
    }

    /// Looks at tokens one by one: for `.await`, for invocations, and into groups, which may be syntax again.
    fn tokens(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let ident = |index: Option<usize>| match index.and_then(|index| tokens.get(index)) {
            Some(TokenTree::Ident(ident)) => Some(ident),
            _ => None,
        };
        let is_punct = |index: Option<usize>, c: char| is_punct(index.and_then(|index| tokens.get(index)), c);
        for (index, token) in tokens.iter().enumerate() {
            let before = |steps: usize| index.checked_sub(steps);
            match token {
                TokenTree::Ident(word) if *word == "await" && is_punct(before(1), '.') && !is_punct(before(2), '.') => {
                    let extent = self.extent(word.span(), word.span());
                    self.found(AwaitKind::Await, word.span(), extent);
                }
                TokenTree::Group(group) if is_punct(before(1), '!') && ident(before(2)).is_some() => {
                    let name = ident(before(2)).map(ToString::to_string).unwrap_or_default();
                    let start = tokens[path_start(&tokens, index - 2)].span();
                    self.invocation(&name, start, group.span_close(), group.stream());
                }
                TokenTree::Group(group) => {
                    let of_async = |at: Option<usize>| ident(at).is_some_and(|word| *word == "async");
                    let moved = ident(before(1)).is_some_and(|word| *word == "move");
                    let is_async = of_async(if moved { before(2) } else { before(1) });
                    self.group(group, is_async && group.delimiter() == Delimiter::Brace);
                }
                _ => {}
            }
        }
    }

    fn group(&mut self, group: &Group, is_async: bool) {
        if is_async {
            let extent = self.extent(group.span(), group.span());
            self.within(true, extent, |this| this.contents("", group.stream()));
        } else {
            self.contents("", group.stream());
        }
    }

    /// The bodies of a `macro_rules!`, which are on the right of its arrows. Whether they wait is decided where they
    /// are used, so a `select!` in them counts.
    fn rules(&mut self, name: &str, tokens: TokenStream) {
        let around = std::mem::replace(&mut self.function, Function { name: format!("{name}!"), public: false });
        let was_async = std::mem::replace(&mut self.is_async, true);
        let mut arrow = String::new();
        for token in tokens {
            match token {
                TokenTree::Group(group) if arrow == "=>" => self.contents("", group.stream()),
                TokenTree::Punct(punct) => {
                    arrow.push(punct.as_char());
                    continue;
                }
                _ => {}
            }
            arrow.clear();
        }
        self.function = around;
        self.is_async = was_async;
    }

    fn declaration(&mut self, module: &ItemMod) {
        let mut declaration = Declaration {
            name: plain(&module.ident),
            inside: self.modules.clone(),
            path: None,
            perhaps: Vec::new(),
            is_conditional: false,
        };
        for attribute in &module.attrs {
            declaration.is_conditional |= attribute.path().is_ident("cfg");
            if let Some(path) = path_of(&attribute.meta) {
                declaration.path = Some(path);
            } else if attribute.path().is_ident("cfg_attr") {
                let metas = attribute.parse_args_with(MetaList::parse_terminated).unwrap_or_default();
                declaration.perhaps.extend(metas.iter().skip(1).filter_map(path_of));
            }
        }
        self.declarations.push(declaration);
    }
}

impl<'ast> Visit<'ast> for Scanner<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        if !self.is_skipped(item) {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item(&mut self, item: &'ast ImplItem) {
        if !self.is_skipped(item) {
            visit::visit_impl_item(self, item);
        }
    }

    fn visit_trait_item(&mut self, item: &'ast TraitItem) {
        if !self.is_skipped(item) {
            visit::visit_trait_item(self, item);
        }
    }

    fn visit_stmt(&mut self, statement: &'ast Stmt) {
        if !self.is_skipped(statement) {
            visit::visit_stmt(self, statement);
        }
    }

    fn visit_arm(&mut self, arm: &'ast syn::Arm) {
        if !self.is_skipped(arm) {
            visit::visit_arm(self, arm);
        }
    }

    /// Attributes contain no code of this file.
    fn visit_attribute(&mut self, _: &'ast Attribute) {}

    /// Syntax that syn does not know.
    fn visit_token_stream(&mut self, tokens: &'ast TokenStream) {
        self.tokens(tokens.clone());
    }

    fn visit_item_mod(&mut self, module: &'ast ItemMod) {
        if module.content.is_none() {
            self.declaration(module);
            return;
        }
        let path = module.attrs.iter().find_map(|attribute| path_of(&attribute.meta));
        self.modules.push(path.unwrap_or_else(|| plain(&module.ident)));
        visit::visit_item_mod(self, module);
        self.modules.pop();
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        let here = Owner { name: type_name(&item.self_ty), makes_public: item.trait_.is_some() };
        let around = std::mem::replace(&mut self.owner, here);
        visit::visit_item_impl(self, item);
        self.owner = around;
    }

    fn visit_item_trait(&mut self, item: &'ast syn::ItemTrait) {
        let public = matches!(item.vis, Visibility::Public(_));
        let here = Owner { name: plain(&item.ident), makes_public: public };
        let around = std::mem::replace(&mut self.owner, here);
        visit::visit_item_trait(self, item);
        self.owner = around;
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.function(&item.sig.ident, &item.vis, item.sig.asyncness.is_some(), &item.block);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.function(&item.sig.ident, &item.vis, item.sig.asyncness.is_some(), &item.block);
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(block) = &item.default {
            self.function(&item.sig.ident, &Visibility::Inherited, item.sig.asyncness.is_some(), block);
        }
    }

    fn visit_expr_async(&mut self, block: &'ast syn::ExprAsync) {
        let extent = self.extent(block.block.span(), block.block.span());
        self.within(true, extent, |this| this.visit_block(&block.block));
    }

    fn visit_expr_closure(&mut self, closure: &'ast syn::ExprClosure) {
        let extent = self.extent(closure.body.span(), closure.body.span());
        self.within(closure.asyncness.is_some(), extent, |this| this.visit_expr(&closure.body));
    }

    fn visit_expr_await(&mut self, expression: &'ast syn::ExprAwait) {
        let word = expression.await_token.span();
        let extent = self.extent(first_span(&expression.base), word);
        self.found(AwaitKind::Await, word, extent);
        self.visit_expr(&expression.base);
    }

    fn visit_item_macro(&mut self, item: &'ast syn::ItemMacro) {
        match &item.ident {
            Some(name) => self.rules(&name.to_string(), item.mac.tokens.clone()),
            None => self.visit_macro(&item.mac),
        }
    }

    fn visit_macro(&mut self, invoked: &'ast syn::Macro) {
        let name = invoked.path.segments.last().map(|segment| segment.ident.to_string()).unwrap_or_default();
        let end = invoked.delimiter.span().close();
        self.invocation(&name, first_span(&invoked.path), end, invoked.tokens.clone());
    }
}

type MetaList = syn::punctuated::Punctuated<Meta, Token![,]>;

/// The span of the first token, because the whole span is just this if the spans cannot be joined.
fn first_span(node: &impl ToTokens) -> Span {
    node.to_token_stream().into_iter().next().map_or_else(Span::call_site, |token| token.span())
}

fn is_punct(token: Option<&TokenTree>, c: char) -> bool {
    matches!(token, Some(TokenTree::Punct(punct)) if punct.as_char() == c)
}

/// Where the path begins whose last part is at `index`: `::tokio::select`, `$crate::select`.
fn path_start(tokens: &[TokenTree], index: usize) -> usize {
    let is = |index: Option<usize>, c| is_punct(index.and_then(|index| tokens.get(index)), c);
    let mut start = index;
    while is(start.checked_sub(1), ':') && is(start.checked_sub(2), ':') {
        start -= 2;
        match start.checked_sub(1) {
            Some(part) if matches!(tokens[part], TokenTree::Ident(_)) => start = part,
            _ => return start,
        }
    }
    if is(start.checked_sub(1), '$') { start - 1 } else { start }
}

/// A name without `r#`.
fn plain(name: &syn::Ident) -> String {
    let name = name.to_string();
    name.strip_prefix("r#").map(str::to_owned).unwrap_or(name)
}

fn type_name(of: &Type) -> String {
    match of {
        Type::Path(path) => path.path.segments.last().map(|last| last.ident.to_string()).unwrap_or_default(),
        Type::Reference(reference) => type_name(&reference.elem),
        other => other.to_token_stream().to_string().replace(' ', ""),
    }
}

fn path_of(meta: &Meta) -> Option<String> {
    let Meta::NameValue(pair) = meta else { return None };
    let Expr::Lit(value) = &pair.value else { return None };
    match &value.lit {
        Lit::Str(path) if pair.path.is_ident("path") => Some(path.value()),
        _ => None,
    }
}

/// Whether this attribute marks code that is compiled only for tests: `#[cfg(test)]`, or a test function of some
/// framework.
fn is_for_tests(attribute: &Attribute) -> bool {
    let is_test = attribute.path().segments.last().is_some_and(|last| last.ident == "test");
    let is_cfg = attribute.path().is_ident("cfg");
    is_test || is_cfg && attribute.parse_args::<Meta>().is_ok_and(|condition| needs_test(&condition))
}

fn needs_test(condition: &Meta) -> bool {
    let parts = |list: &syn::MetaList| list.parse_args_with(MetaList::parse_terminated).unwrap_or_default();
    match condition {
        Meta::Path(path) => path.is_ident("test"),
        Meta::List(list) if list.path.is_ident("all") => parts(list).iter().any(needs_test),
        Meta::List(list) if list.path.is_ident("any") => {
            let parts = parts(list);
            !parts.is_empty() && parts.iter().all(needs_test)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests;
