//! The tokens of a macro, read as the syntax that they most likely are.
//!
//! Invariant: tokens are parsed as a whole or not at all. In the latter case the caller looks at the tokens one by one,
//! and loses no await.

use proc_macro2::TokenStream;
use syn::parse::{Parse, ParseStream, Parser};
use syn::punctuated::Punctuated;
use syn::{Attribute, Block, Expr, Ident, Pat, Stmt, Token, token};

/// The macros of tokio and futures that await all their arms themselves.
const WAITING: [&str; 4] = ["join", "select", "select_biased", "try_join"];

/// The macros whose tokens are data, or code for another place.
const QUOTING: [&str; 5] = ["parse_quote", "parse_quote_spanned", "quote", "quote_spanned", "stringify"];

/// The macros of async-stream, which turn their tokens into an async block.
const ASYNC: [&str; 2] = ["stream", "try_stream"];

pub(crate) fn is_waiting(name: &str) -> bool {
    WAITING.contains(&name)
}

pub(crate) fn is_quoting(name: &str) -> bool {
    QUOTING.contains(&name)
}

pub(crate) fn makes_async(name: &str) -> bool {
    ASYNC.contains(&name)
}

/// What the tokens of a macro are.
pub(crate) enum Contents {
    Expressions(Vec<Expr>),
    Statements(Vec<Stmt>),
    Arms(Vec<Arm>),
    /// Nothing known.
    Tokens(TokenStream),
}

/// One arm of a `select!`.
pub(crate) struct Arm {
    pub(crate) pattern: Option<Pat>,
    /// The future, the condition if there is one, and the handler.
    pub(crate) expressions: Vec<Expr>,
}

/// Reads the tokens of the macro of this name.
pub(crate) fn read(name: &str, tokens: TokenStream) -> Contents {
    if name.starts_with("select")
        && let Ok(arms) = arms.parse2(tokens.clone())
    {
        return Contents::Arms(arms);
    }
    // A group of tokens without a name may be anything too.
    if let Ok(expressions) = expressions.parse2(tokens.clone()) {
        return Contents::Expressions(expressions);
    }
    if let Ok(statements) = Block::parse_within.parse2(tokens.clone()) {
        return Contents::Statements(statements);
    }
    Contents::Tokens(tokens)
}

/// Reads the attributes before an item, a statement or an arm.
pub(crate) fn attributes(tokens: TokenStream) -> Vec<Attribute> {
    let parser = |input: ParseStream<'_>| {
        let attributes = Attribute::parse_outer(input)?;
        input.parse::<TokenStream>()?;
        Ok(attributes)
    };
    parser.parse2(tokens).unwrap_or_default()
}

/// `a.await, b, c`, after `biased;` in the `join!` of tokio.
fn expressions(input: ParseStream<'_>) -> syn::Result<Vec<Expr>> {
    skip_biased(input)?;
    Ok(Punctuated::<Expr, Token![,]>::parse_terminated(input)?.into_iter().collect())
}

fn arms(input: ParseStream<'_>) -> syn::Result<Vec<Arm>> {
    skip_biased(input)?;
    let mut arms = Vec::new();
    while !input.is_empty() {
        arms.push(input.parse()?);
    }
    Ok(arms)
}

fn skip_biased(input: ParseStream<'_>) -> syn::Result<()> {
    if input.peek(Ident) && input.peek2(Token![;]) && input.fork().parse::<Ident>()? == "biased" {
        input.parse::<Ident>()?;
        input.parse::<Token![;]>()?;
    }
    Ok(())
}

impl Parse for Arm {
    fn parse(input: ParseStream<'_>) -> syn::Result<Self> {
        let mut arm = Self { pattern: None, expressions: Vec::new() };
        if input.peek(Token![else]) {
            input.parse::<Token![else]>()?;
        } else if input.peek(Ident) && input.peek2(Token![=>]) {
            // The `complete` and `default` of futures.
            input.parse::<Ident>()?;
        } else {
            arm.pattern = Some(Pat::parse_multi_with_leading_vert(input)?);
            input.parse::<Token![=]>()?;
            arm.expressions.push(input.parse()?);
            if input.peek(Token![,]) {
                input.parse::<Token![,]>()?;
                input.parse::<Token![if]>()?;
                arm.expressions.push(input.parse()?);
            }
        }
        input.parse::<Token![=>]>()?;
        // A block needs no comma after it, as in a `match`.
        let is_block = input.peek(token::Brace);
        arm.expressions.push(Expr::parse_with_earlier_boundary_rule(input)?);
        if input.peek(Token![,]) {
            input.parse::<Token![,]>()?;
        } else if !input.is_empty() && !is_block {
            return Err(input.error("expected `,`"));
        }
        Ok(arm)
    }
}
