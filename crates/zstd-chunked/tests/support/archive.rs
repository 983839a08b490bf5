//! Builds tar archives by hand, block by block, so that tests decide every byte of a header.
#![allow(dead_code, reason = "not every test binary uses all of it")]

/// An archive in the making.
#[derive(Clone, Default)]
pub(crate) struct Archive {
    pub(crate) bytes: Vec<u8>,
}

/// A header's fields; `extra` changes the finished block before its checksum is computed.
pub(crate) struct Member<'a> {
    pub(crate) kind: u8,
    pub(crate) name: &'a [u8],
    pub(crate) link: &'a [u8],
    pub(crate) mode: u32,
    pub(crate) ids: (u32, u32),
    pub(crate) time: u64,
    pub(crate) device: (u32, u32),
    pub(crate) content: &'a [u8],
    pub(crate) gnu: bool,
}

impl Default for Member<'_> {
    fn default() -> Self {
        Self {
            kind: b'0',
            name: b"file",
            link: b"",
            mode: 0o644,
            ids: (1000, 1001),
            time: 1_700_000_000,
            device: (0, 0),
            content: b"",
            gnu: false,
        }
    }
}

impl Archive {
    pub(crate) fn add(&mut self, member: &Member<'_>) -> &mut Self {
        self.add_with(member, |_| {})
    }

    pub(crate) fn add_with(&mut self, member: &Member<'_>, extra: impl FnOnce(&mut [u8; 512])) -> &mut Self {
        let mut block = [0; 512];
        block[..member.name.len()].copy_from_slice(member.name);
        octal(&mut block[100..108], u64::from(member.mode));
        octal(&mut block[108..116], u64::from(member.ids.0));
        octal(&mut block[116..124], u64::from(member.ids.1));
        octal(&mut block[124..136], member.content.len() as u64);
        octal(&mut block[136..148], member.time);
        block[156] = member.kind;
        block[157..157 + member.link.len()].copy_from_slice(member.link);
        block[257..265].copy_from_slice(if member.gnu { b"ustar  \0" } else { b"ustar\x0000" });
        octal(&mut block[329..337], u64::from(member.device.0));
        octal(&mut block[337..345], u64::from(member.device.1));
        extra(&mut block);
        block[148..156].fill(b' ');
        let sum = block.iter().map(|&byte| u64::from(byte)).sum();
        octal(&mut block[148..155], sum);
        self.bytes.extend_from_slice(&block);
        self.bytes.extend_from_slice(member.content);
        self.pad()
    }

    pub(crate) fn pad(&mut self) -> &mut Self {
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(&mut self, name: &str, content: &[u8]) -> &mut Self {
        self.add(&Member { name: name.as_bytes(), content, ..Member::default() })
    }

    pub(crate) fn dir(&mut self, name: &str) -> &mut Self {
        self.add(&Member { kind: b'5', name: name.as_bytes(), mode: 0o755, ..Member::default() })
    }

    pub(crate) fn link(&mut self, kind: u8, name: &str, target: &str) -> &mut Self {
        self.add(&Member { kind, name: name.as_bytes(), link: target.as_bytes(), ..Member::default() })
    }

    /// A PAX header (`x`) or a global one (`g`).
    pub(crate) fn pax(&mut self, kind: u8, records: &[(&str, &[u8])]) -> &mut Self {
        let mut content = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            content.extend_from_slice(format!("{length} {key}=").as_bytes());
            content.extend_from_slice(value);
            content.push(b'\n');
        }
        self.add(&Member { kind, name: b"pax", content: &content, ..Member::default() })
    }

    /// GNU's long name (`L`) or link (`K`).
    pub(crate) fn long(&mut self, kind: u8, text: &str) -> &mut Self {
        let content = [text.as_bytes(), b"\0"].concat();
        self.add(&Member { kind, name: b"././@LongLink", content: &content, gnu: true, ..Member::default() })
    }

    /// The archive with its end, in records of 10 KiB.
    pub(crate) fn end(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes.resize((bytes.len() + 1024).next_multiple_of(10_240), 0);
        bytes
    }
}

fn octal(field: &mut [u8], number: u64) {
    let digits = field.len() - 1;
    field[..digits].copy_from_slice(format!("{number:0digits$o}").as_bytes());
}
